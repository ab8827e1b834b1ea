"""What the engine gives a wrapper for one step, and what it gets back, as numpy arrays.

Owns: the shapes that steps are padded to (StepShape, StepShapes) and the arrays of a step (StepBatch, StepResult).
Does not know: jax, requests, queues.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from jaxinfer.config import EngineConfig

SAMPLING_FIELDS = 6
"""int32 words of a slot's sampling numbers: temperature, top_p, min_p (float32 bits), top_k, seed low, seed high."""
PREFILL_BLOCK = 16
"""Q, tokens of a prefill row. A chunk of a prompt takes as many rows as it needs: 40 tokens take rows of 16, 16 and 8.
The keys of all rows are written before any row attends, so that every row sees the rows in front of it. As all rows
have one length, the cost of a step follows its tokens, not its longest chunk, and few shapes are compiled."""
MAX_CHUNKS = 16
"""Chunks of one step at most, so that the head sees few rows beside the decode rows. With drafts, a step may have as
many chunks more as sequences can decode in it, since every sequence with drafts takes a chunk."""


NO_TARGET = -1


class SamplerVariant(enum.Enum):
    """Which compiled sampler a batch needs: GREEDY for rows of temperature 0 alone, UNFILTERED for rows without top_k,
    top_p or min_p, CANDIDATES where all random rows have such a filter, FULL for any rows. A later one can do all that
    an earlier one can."""

    GREEDY = "greedy"
    UNFILTERED = "unfiltered"
    CANDIDATES = "candidates"
    FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """The padded shape of a step; every shape has a compiled program of its own.

    Args:
      num_decode: R, rows of the decode segment, one token each.
      num_prefill: P, rows of the prefill segment.
      row_len: tokens of a prefill row on the device: PREFILL_BLOCK, or fewer in steps whose chunks are all short. A
        StepBatch always has PREFILL_BLOCK tokens a row, of which the first row_len are used.
      num_logits: M, logit rows, one for each position behind which a token is sampled.
      scored: the step also returns the hidden states of all prefill tokens, to score prompts.
    """

    num_decode: int
    num_prefill: int = 0
    row_len: int = PREFILL_BLOCK
    num_logits: int
    scored: bool = False

    @property
    def num_tokens(self) -> int:
        """T, the padded tokens of both segments."""
        return self.num_decode + self.num_prefill * self.row_len


@dataclass(frozen=True, kw_only=True)
class SlotEdits:
    """The logit edits of a sequence at the time when its first token since admission is sampled.

    Args:
      bias_of_others: bias of the tokens that have no bias entry; -inf allows only tokens that have one.
      penalties: float32[3], repetition, presence, frequency.
      min_position: first position in the text, the prompt included, at which a stop token may come.
      kinds, token_ids, values: int32[J], int32[J], float32[J], as in logit_edits.EditEntries.
    """

    bias_of_others: float
    penalties: Float32[np.ndarray, " 3"]
    min_position: int
    kinds: Int32[np.ndarray, " J"]
    token_ids: Int32[np.ndarray, " J"]
    values: Float32[np.ndarray, " J"]

    @classmethod
    def none(cls) -> SlotEdits:
        """Edits that change nothing."""
        ids = np.zeros(0, np.int32)
        penalties = np.array([1, 0, 0], np.float32)
        return cls(
            bias_of_others=0.0,
            penalties=penalties,
            min_position=0,
            kinds=ids,
            token_ids=ids,
            values=np.zeros(0, np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One step's work, padded to its shape.

    A padding row names the dump slot and has length 0. The wrapper keeps every slot's last token, length, page table
    and sampling numbers; a step brings only what changes.

    Args:
      shape: the shape of the arrays below.
      dump_slot: the last slot, which no sequence has.
      decode_slots: int32[R], slot of each decode row.
      decode_page_index, decode_page_id: int32[R], page table entry to set before the step, and the page to put there;
        index W (the width of the table) sets none.
      chunk_slots: int32[N], slot of each chunk of the prefill segment.
      chunk_pages: int32[N, W], the slot's whole page table.
      chunk_sampling: int32[N, SAMPLING_FIELDS], the slot's sampling numbers.
      prefill_slots: int32[P], slot of each prefill row; rows of one chunk follow each other.
      prefill_start, prefill_len: int32[P], position of the row's first token, and how many of its Q tokens are no
        padding.
      prefill_tokens: int32[P, Q], Q = PREFILL_BLOCK whatever the shape.
      logit_index: int32[M], the token behind which each logit row samples: r is decode row r, max_decode + p * Q + q is
        token q of prefill row p.
      logit_slots: int32[M], the slot whose sampling numbers apply; the dump slot for padding.
      logit_feeds: bool[M], whether the sampled token becomes its slot's last token.
      page_copies: int32[n, 2], source and destination pages, copied before anything is written.
      variant: the sampler to run.
      num_top: how many of the most likely tokens to report at each logit row, beside the sampled one; None reports no
        log-probabilities at all.
      targets: int32[P, Q], the token whose log-probability is wanted behind each prefill token, NO_TARGET for none;
        None if the step scores no prompt.
      edited: whether any sampled row has logit edits or a constraint.
      new_edits: by slot, the edits of the sequences whose first token since admission is sampled in this step; None for
        a sequence without edits.
    """

    shape: StepShape
    dump_slot: int
    decode_slots: Int32[np.ndarray, " R"]
    decode_page_index: Int32[np.ndarray, " R"]
    decode_page_id: Int32[np.ndarray, " R"]
    chunk_slots: Int32[np.ndarray, " N"]
    chunk_pages: Int32[np.ndarray, "N W"]
    chunk_sampling: Int32[np.ndarray, "N F"]
    prefill_slots: Int32[np.ndarray, " P"]
    prefill_start: Int32[np.ndarray, " P"]
    prefill_len: Int32[np.ndarray, " P"]
    prefill_tokens: Int32[np.ndarray, "P Q"]
    logit_index: Int32[np.ndarray, " M"]
    logit_slots: Int32[np.ndarray, " M"]
    logit_feeds: Bool[np.ndarray, " M"]
    page_copies: Int32[np.ndarray, "J 2"]
    variant: SamplerVariant
    num_top: int | None = None
    targets: Int32[np.ndarray, "P Q"] | None = None
    edited: bool = False
    new_edits: Mapping[int, SlotEdits | None] = field(default_factory=dict)

    @property
    def num_live_rows(self) -> int:
        """Rows of both segments, without padding."""
        return int((self.decode_slots != self.dump_slot).sum() + (self.prefill_slots != self.dump_slot).sum())

    @property
    def has_logits(self) -> bool:
        """Whether the step samples any token."""
        return bool((self.logit_slots != self.dump_slot).any())

    @classmethod
    def idle(cls, shapes: StepShapes) -> StepBatch:
        """A step without work, which moves the steps in a pipeline on by one stage."""
        shape = shapes.shape(num_decode=0, num_prefill=0, num_logits=0)

        def full(*dims: int, value: int = 0) -> np.ndarray:
            return np.full(dims, value, np.int32)

        return cls(
            shape=shape,
            dump_slot=shapes.num_slots,
            decode_slots=full(shape.num_decode, value=shapes.num_slots),
            decode_page_index=full(shape.num_decode, value=shapes.table_width),
            decode_page_id=full(shape.num_decode),
            chunk_slots=full(0),
            chunk_pages=full(0, shapes.table_width),
            chunk_sampling=full(0, SAMPLING_FIELDS),
            prefill_slots=full(0),
            prefill_start=full(0),
            prefill_len=full(0),
            prefill_tokens=full(0, PREFILL_BLOCK),
            logit_index=full(shape.num_logits),
            logit_slots=full(shape.num_logits, value=shapes.num_slots),
            logit_feeds=np.zeros(shape.num_logits, bool),
            page_copies=full(0, 2),
            variant=SamplerVariant.GREEDY,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowUsage:
    """Rows of both segments, summed over pipeline stages and steps.

    Args:
      live: rows with work.
      launched: all rows of the programs that ran, padding included.
    """

    live: int
    launched: int


@dataclass(frozen=True, kw_only=True)
class LogprobArrays:
    """Raw log-probabilities (natural log, before edits and temperature) at M positions.

    Args:
      logprob, rank: float[M], int32[M], of the sampled or scored token; rank 1 is the most likely.
      top_ids, top_logprobs: int32[M, K], float[M, K], the K most likely tokens, best first.
    """

    logprob: Float[np.ndarray, " M"]
    rank: Int32[np.ndarray, " M"]
    top_ids: Int32[np.ndarray, "M K"]
    top_logprobs: Float[np.ndarray, "M K"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The results of a step.

    Args:
      token_ids: int32[M], the sampled tokens; empty if the step samples none.
      logprobs: log-probabilities at the M logit rows; None if the step did not ask for them.
      scores: log-probabilities of StepBatch.targets at the P * Q prefill tokens; None if the step has no targets.
    """

    token_ids: Int32[np.ndarray, " M"]
    logprobs: LogprobArrays | None = None
    scores: LogprobArrays | None = None


@dataclass(frozen=True, kw_only=True)
class AllowedTokens:
    """The tokens that constraints allow next, for the slots that have a constraint.

    Args:
      slots: int32[J].
      words: uint32[J, ceil(V / 32)], a bit per token: token t is allowed if bit t % 32 of word t // 32 is 1.
    """

    slots: Int32[np.ndarray, " J"]
    words: UInt32[np.ndarray, "J K"]


def pack_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> Int32[np.ndarray, " F"]:
    """A slot's sampling numbers as int32 words.

    A top_k too large for an int32 becomes the largest one: both exceed every vocabulary, so neither filters anything.
    """
    floats = np.array([temperature, top_p, min_p], np.float32).view(np.int32)
    top_k = min(max(top_k, 0), np.iinfo(np.int32).max)
    integers = np.array([top_k, seed & 0xFFFFFFFF, seed >> 32], np.int64).astype(np.uint32).view(np.int32)
    return np.concatenate([floats, integers])


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages hold num_tokens positions."""
    return -(-num_tokens // page_size)


def num_blocks(num_tokens: int) -> int:
    """How many prefill rows a chunk of num_tokens tokens takes."""
    return -(-num_tokens // PREFILL_BLOCK)


class StepShapes:
    """The short list of shapes that steps are padded to, so that few programs have to be compiled.

    - Steps without prefill have a power of two decode rows, or the maximum: one for every slot, and 1/S of that in a
      pipeline of S stages, where a sequence decodes in every S-th step only.
    - Steps with prefill combine 0, 4, 16, 64, .. or the maximum of decode rows with 1, 2, 4, .. or the maximum of
      prefill rows, which is max_num_batched_tokens tokens. 3 decode and 5 prefill rows are padded to 4 and 8.
    - Logit rows: a power of two, so that there are few shapes of samplers. One row per sequence that samples in this
      step; with speculative decoding, one per token that is verified.
    - Short prefill rows: with speculative decoding, a step whose chunks are all as short as a last token with its
      drafts has prefill rows of that length; but not in a pipeline, where the batches in flight share one layout.
    - Steps that score prompts have the most decode rows and a power of four prefill rows, or the maximum.

    Args:
      config: the engine's settings.
      max_model_len: tokens of the longest possible request.
    """

    def __init__(self, config: EngineConfig, *, max_model_len: int):
        self.num_slots = config.max_num_seqs
        self.table_width = pages_for(max_model_len, config.page_size)
        self.num_stages = config.pipeline_parallel_size
        self.max_decode = -(-config.max_num_seqs // self.num_stages)
        self.max_prefill = num_blocks(min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len))
        self.max_drafts = 0 if config.draft_model is None else config.num_draft_tokens
        self.max_chunks = MAX_CHUNKS + (self.max_decode if self.max_drafts else 0)
        self._decode_rows = _powers(1, 2, self.max_decode)
        self._mixed_rows = [0, *_powers(4, 4, self.max_decode)]
        self._prefill_rows = _powers(1, 2, self.max_prefill)
        self._scored_rows = _powers(4, 4, self.max_prefill)

    def shape(
        self,
        *,
        num_decode: int,
        num_prefill: int,
        num_logits: int,
        row_len: int = PREFILL_BLOCK,
        scored: bool = False,
    ) -> StepShape:
        """The smallest shape that holds a step.

        Args:
          num_decode, num_prefill: rows without padding.
          num_logits: positions behind which a token is sampled.
          row_len: tokens of the longest prefill row.
          scored: as in StepShape.

        Raises:
          ValueError: no shape has so many rows.
        """
        if num_decode > self.max_decode or num_prefill > self.max_prefill:
            raise ValueError(
                f"a step has up to {self.max_decode} decode and {self.max_prefill} prefill rows, "
                f"got {num_decode} and {num_prefill}"
            )
        if scored:
            decode, prefill = self.max_decode, _at_least(self._scored_rows, num_prefill)
        else:
            prefill = _at_least(self._prefill_rows, num_prefill) if num_prefill else 0
            decode = _at_least(self._mixed_rows if prefill else self._decode_rows, num_decode)
        usual = self._num_logits(decode, prefill, drafts=False)
        if num_logits > usual:
            usual = _power_of_two(max(num_logits, self._num_logits(decode, prefill, drafts=True)))
        is_short = prefill > 0 and not scored and self.num_stages == 1 and row_len <= 1 + self.max_drafts
        row_len = 1 + self.max_drafts if self.max_drafts and is_short else PREFILL_BLOCK
        return StepShape(num_decode=decode, num_prefill=prefill, row_len=row_len, num_logits=usual, scored=scored)

    def num_chunks(self, shape: StepShape) -> int:
        """N, how many chunks the prefill segment of a shape can hold."""
        return min(shape.num_prefill, self.max_chunks)

    def largest_shape(self) -> StepShape:
        """The shape that every step fits into, even with a logit row for every token."""
        num_tokens = self.max_decode + self.max_prefill * PREFILL_BLOCK
        return self.shape(num_decode=self.max_decode, num_prefill=self.max_prefill, num_logits=num_tokens)

    def all_shapes(self) -> list[StepShape]:
        """Every shape that a step of an engine can have, smallest first."""
        rows = [(decode, 0) for decode in self._decode_rows]
        rows += [(decode, prefill) for decode in self._mixed_rows for prefill in self._prefill_rows]
        shapes = {
            self.shape(
                num_decode=decode,
                num_prefill=prefill,
                num_logits=self._num_logits(decode, prefill, drafts=drafts),
                row_len=row_len,
            )
            for decode, prefill in rows
            for drafts in {False, self.max_drafts > 0}
            for row_len in (1, PREFILL_BLOCK)
        }
        shapes |= {
            self.shape(num_decode=0, num_prefill=prefill, num_logits=0, scored=True) for prefill in self._scored_rows
        }
        return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_logits, shape.num_prefill, shape.scored))

    def _num_logits(self, decode: int, prefill: int, *, drafts: bool) -> int:
        """Logit rows of a shape: one per sequence that may sample, or with drafts one per token to verify."""
        per_chunk = 1 + self.max_drafts if drafts else 1
        return _power_of_two(decode + min(prefill, self.max_chunks if drafts else MAX_CHUNKS) * per_chunk)


def _powers(start: int, factor: int, limit: int) -> list[int]:
    """start, start * factor, .. below the limit, and the limit itself last."""
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
