"""The shapes that steps are padded to, so that few programs have to be compiled.

Owns: StepShape, the padded shape of a step, and StepShapes, the short list of all of them.
Does not know: jax, what a step computes.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from jaxinfer.config.engine_config import EngineConfig

PREFILL_BLOCK = 16
"""Q, tokens of a prefill row. A chunk of a prompt takes as many rows as it needs: 40 tokens take rows of 16, 16 and 8.
The keys of all rows are written before any row attends, so that every row sees the rows in front of it. As all rows
have one length, the cost of a step follows its tokens, not its longest chunk, and few shapes are compiled."""
MAX_CHUNKS = 16
"""Chunks of one step at most, so that the head sees few rows beside the decode rows. With drafts, a step may have as
many chunks more as sequences can decode in it, since every sequence with drafts takes a chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """The padded shape of a step; every shape has a compiled program of its own.

    Args:
      num_decode: R, rows of the decode segment, one token each.
      num_prefill: P, rows of the prefill segment.
      row_len: tokens of a prefill row on the device: PREFILL_BLOCK, or fewer in steps whose chunks are all short. A
        StepBatch always has PREFILL_BLOCK tokens a row, of which the first row_len are used.
      num_logits: M, logit rows, one for each position after which a token is sampled.
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
          num_logits: positions after which a token is sampled.
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
