"""What the engine hands to a wrapper for one step, and what comes back; numpy only.

Owns: the shapes of a step (StepShape, the list of buckets) and its arrays (StepBatch, StepResult).
Does not know: jax, requests, queues.
"""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int32

from jaxinfer.config import EngineConfig

SAMPLING_FIELDS = 6
"""int32 words of a slot's sampling numbers: temperature, top_p, min_p (float32 bits), top_k, seed low, seed high."""


class SamplerVariant(enum.Enum):
    """Which compiled sampler a batch needs; a later one can do all that an earlier one can."""

    GREEDY = "greedy"
    CANDIDATES = "candidates"
    FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """The shape of a step, hence of its program.

    Args:
      num_decode: R, rows of the decode segment, one token each.
      num_prefill, chunk_len: P rows of Q tokens in the prefill segment.
      num_logits: M, token positions whose hidden states go to the head.
    """

    num_decode: int
    num_prefill: int = 0
    chunk_len: int = 0
    num_logits: int

    @property
    def num_tokens(self) -> int:
        """T, the padded tokens of both segments."""
        return self.num_decode + self.num_prefill * self.chunk_len


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One step's work, padded to its shape.

    A padding row names the dump slot (the last one) and has length 0. The wrapper keeps every slot's last token,
    length, page table and sampling numbers; a step brings only what changes.

    Args:
      shape: of everything below.
      decode_slots: int32[R].
      decode_page_index, decode_page_id: int32[R], page table entry to set before the step; index W sets none.
      prefill_slots: int32[P].
      prefill_start, prefill_len: int32[P], position of the chunk's first token and its live tokens.
      prefill_tokens: int32[P, Q].
      prefill_pages: int32[P, W], the slot's whole page table.
      prefill_sampling: int32[P, SAMPLING_FIELDS].
      logit_index: int32[M], flat token positions (decode rows first, then chunks row by row).
      logit_slots: int32[M], whose sampling numbers and seed apply; the dump slot for padding.
      logit_feeds: bool[M], the sampled token becomes its slot's last token.
      page_copies: int32[n, 2], source and destination pages, copied before anything is written.
      variant: the sampler to run.
      logprobs: also report log-probabilities.
    """

    shape: StepShape
    decode_slots: Int32[np.ndarray, " R"]
    decode_page_index: Int32[np.ndarray, " R"]
    decode_page_id: Int32[np.ndarray, " R"]
    prefill_slots: Int32[np.ndarray, " P"]
    prefill_start: Int32[np.ndarray, " P"]
    prefill_len: Int32[np.ndarray, " P"]
    prefill_tokens: Int32[np.ndarray, "P Q"]
    prefill_pages: Int32[np.ndarray, "P W"]
    prefill_sampling: Int32[np.ndarray, "P F"]
    logit_index: Int32[np.ndarray, " M"]
    logit_slots: Int32[np.ndarray, " M"]
    logit_feeds: Bool[np.ndarray, " M"]
    page_copies: Int32[np.ndarray, "J 2"]
    variant: SamplerVariant
    logprobs: bool


@dataclass(frozen=True, kw_only=True)
class LogprobArrays:
    """Raw log-probabilities of M positions: of the sampled token with its rank, and of the most likely ones."""

    logprob: Float[np.ndarray, " M"]
    rank: Int32[np.ndarray, " M"]
    top_ids: Int32[np.ndarray, "M K"]
    top_logprobs: Float[np.ndarray, "M K"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The sampled tokens int32[M] of a step, and log-probabilities if it asked for them."""

    token_ids: Int32[np.ndarray, " M"]
    logprobs: LogprobArrays | None


def pack_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> Int32[np.ndarray, " F"]:
    """A slot's sampling numbers as int32 words."""
    floats = np.array([temperature, top_p, min_p], np.float32).view(np.int32)
    integers = np.array([max(top_k, 0), seed & 0xFFFFFFFF, seed >> 32], np.int64).astype(np.uint32).view(np.int32)
    return np.concatenate([floats, integers])


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold num_tokens positions."""
    return -(-num_tokens // page_size)


class StepShapes:
    """The short list of shapes that steps are padded to.

    Decode-only steps have a power of two rows. Steps with prefill combine a power of four decode rows with 1, 4, 16 ..
    chunks of 16, 64, 256 .. tokens, padded prefill never above max_num_batched_tokens. The head sees a power of two
    rows, so that the samplers' shapes are few.

    Args:
      config: the engine's settings.
      max_model_len: tokens of the longest request.
    """

    def __init__(self, config: EngineConfig, *, max_model_len: int):
        self.num_slots = config.max_num_seqs
        self.table_width = pages_for(max_model_len, config.page_size)
        self._max_prefill_tokens = config.max_num_batched_tokens
        self._chunk_lens = _powers(16, 4, min(config.max_num_batched_tokens, max_model_len))
        self._chunk_counts = _powers(1, 4, config.max_num_seqs)
        self._decode_rows = _powers(1, 2, config.max_num_seqs)
        self._mixed_rows = [0, *_powers(4, 4, config.max_num_seqs)]

    def longest_chunk(self, count: int) -> int:
        """Tokens of the longest chunk that one step can take beside others, `count` in all; 0 if not even that many."""
        return max((length for length in self._chunk_lens if self.holds_chunks(count, length)), default=0)

    def holds_chunks(self, count: int, longest: int) -> bool:
        """Whether one step can take `count` chunks of up to `longest` tokens, padding included."""
        if count > self._chunk_counts[-1] or longest > self._chunk_lens[-1]:
            return False
        rows, length = _at_least(self._chunk_counts, count), _at_least(self._chunk_lens, longest)
        return rows * length <= self._max_prefill_tokens

    def shape(self, *, num_decode: int, num_prefill: int, longest_chunk: int, num_logits: int) -> StepShape:
        """The smallest shape that holds a step.

        Args:
          num_decode: live decode rows.
          num_prefill, longest_chunk: live chunks and the tokens of the longest one.
          num_logits: positions for the head.

        Raises:
          ValueError: no shape holds the chunks.
        """
        if not num_prefill:
            rows = _at_least(self._decode_rows, num_decode)
            return StepShape(num_decode=rows, num_logits=_power_of_two(max(num_logits, rows)))
        if not self.holds_chunks(num_prefill, longest_chunk):
            raise ValueError(f"no step shape holds {num_prefill} chunks of up to {longest_chunk} tokens")
        rows, count = _at_least(self._mixed_rows, num_decode), _at_least(self._chunk_counts, num_prefill)
        return StepShape(
            num_decode=rows,
            num_prefill=count,
            chunk_len=_at_least(self._chunk_lens, longest_chunk),
            num_logits=_power_of_two(max(num_logits, rows + count)),
        )

    def all_shapes(self) -> list[StepShape]:
        """Every shape an ordinary step can have (one logit a row at most), smallest first."""
        decode = [(rows, 0, 0) for rows in self._decode_rows]
        mixed = [
            (rows, count, length)
            for rows in self._mixed_rows
            for count in self._chunk_counts
            for length in self._chunk_lens
            if self.holds_chunks(count, length)
        ]
        shapes = [
            self.shape(num_decode=rows, num_prefill=count, longest_chunk=length, num_logits=0)
            for rows, count, length in decode + mixed
        ]
        return sorted(shapes, key=lambda shape: shape.num_tokens)


def _powers(start: int, factor: int, limit: int) -> list[int]:
    """start, start * factor, .. and the limit itself last."""
    values = []
    while start < limit:
        values.append(start)
        start *= factor
    return [*values, limit]


def _at_least(ascending: list[int], value: int) -> int:
    return ascending[bisect.bisect_left(ascending, value)]


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least value."""
    return 1 << (value - 1).bit_length()
