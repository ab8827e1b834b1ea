"""The shapes that steps are padded to, so that few programs have to be compiled.

Owns: StepShape, the padded shape of a step, and StepShapes, the short list of all of them.
Does not know: jax, what a step computes.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property

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

    def holds(self, other: StepShape) -> bool:
        """Whether a step that is padded to another shape can be padded to this one instead."""
        sizes = ("num_decode", "num_prefill", "row_len", "num_logits")
        return self.scored == other.scored and all(getattr(self, name) >= getattr(other, name) for name in sizes)


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages hold num_tokens positions."""
    return -(-num_tokens // page_size)


def num_blocks(num_tokens: int) -> int:
    """How many prefill rows a chunk of num_tokens tokens takes."""
    return -(-num_tokens // PREFILL_BLOCK)


class StepShapes:
    """The short list of shapes that steps are padded to, so that few programs have to be compiled.

    The rows of a small step cost little, since the weights are read once for all of them: on two CPU cores, a step of
    the 135M shape with 2 rows takes as long as one with 8, within a tenth. The list is coarser still for GPUs, where
    this holds for more rows and compiling takes longer. Of these rows R is the most decode rows of a step: one for
    every slot, and 1/S of that in a pipeline of S stages, where a sequence decodes in every S-th step only. P is the
    most prefill rows: max_num_batched_tokens tokens.

    - Steps without prefill have 1, 8, 16, 32, .. R decode rows.
    - Steps with prefill combine 0, 16 and R decode rows with 1, 4, 8, 16, .. P prefill rows, so that 3 decode and 5
      prefill rows are padded to 16 and 8; in the coarse list the fewest prefill rows are 4.
    - Logit rows: 1, 8, 16, 32, .., or in the coarse list 1, 8, 32, 128, .. and the most, so that there are few shapes
      of samplers. One row per sequence that samples in this step; with speculative decoding, one per token that is
      verified.
    - Short prefill rows: with speculative decoding, a step whose chunks are all as short as a last token with its
      drafts has prefill rows of that length; but not in a pipeline, where the batches in flight share one layout.
    - Steps that score prompts have the most decode rows and 4, 16, 64, .. prefill rows (coarse: 16, 128, ..), or P.

    Args:
      config: the engine's settings.
      max_model_len: tokens of the longest possible request.
      coarse: which list.
    """

    def __init__(self, config: EngineConfig, *, max_model_len: int, coarse: bool = False):
        self.num_slots = config.max_num_seqs
        self.max_model_len = max_model_len
        self.table_width = pages_for(max_model_len, config.page_size)
        self.num_stages = config.pipeline_parallel_size
        self.max_decode = -(-config.max_num_seqs // self.num_stages)
        self.max_prefill = num_blocks(min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len))
        self.max_drafts = 0 if config.draft_model is None else config.num_draft_tokens
        self.max_chunks = MAX_CHUNKS + (self.max_decode if self.max_drafts else 0)
        max_logits = -(-(self.max_decode + min(self.max_prefill, MAX_CHUNKS)) // 8) * 8
        self._decode_rows = sorted({1, *_powers(8, 2, self.max_decode)})
        self._mixed_rows = sorted({0, min(16, self.max_decode), self.max_decode})
        self._prefill_rows = _powers(4, 2, self.max_prefill)
        if coarse:
            self._scored_rows = _powers(16, 8, self.max_prefill)
            self._logit_rows = [1, *_powers(8, 4, max_logits)]
        else:
            self._prefill_rows = sorted({1, *self._prefill_rows})
            self._scored_rows = _powers(4, 4, self.max_prefill)
            self._logit_rows = [1, *_powers(8, 2, max_logits)]

    @classmethod
    def on_platform(cls, platform: str, config: EngineConfig, *, max_model_len: int) -> StepShapes:
        """The shapes for devices of a platform: the coarse list for "gpu", the fine one for others."""
        return cls(config, max_model_len=max_model_len, coarse=platform == "gpu")

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
            self.shape(
                num_decode=0,
                num_prefill=prefill,
                num_logits=self._num_logits(self.max_decode, prefill, drafts=drafts),
                scored=True,
            )
            for prefill in self._scored_rows
            for drafts in {False, self.max_drafts > 0}
        }
        return sorted(shapes, key=_size)

    def __contains__(self, shape: StepShape) -> bool:
        """Whether a step of an engine can have this shape."""
        return shape in self._every_shape

    @cached_property
    def _every_shape(self) -> frozenset[StepShape]:
        return frozenset(self.all_shapes())

    def covering_shapes(self) -> list[StepShape]:
        """A few of all shapes, such that every step fits into one of them without much padding."""
        rows = [(_at_least(self._decode_rows, min(number, self.max_decode)), 0) for number in (1, 8, 32, 2**31)]
        prefill = [_at_least(self._prefill_rows, min(number, self.max_prefill)) for number in (16, 64, 2**31)]
        few = _at_least(self._mixed_rows, min(16, self.max_decode))
        rows += [(few, prefill[0]), (self.max_decode, prefill[1]), (self.max_decode, prefill[2])]
        shapes = {
            self.shape(
                num_decode=decode, num_prefill=prefill, num_logits=self._num_logits(decode, prefill, drafts=False)
            )
            for decode, prefill in rows
        }
        shapes.add(self.shape(num_decode=0, num_prefill=self.max_prefill, num_logits=0, scored=True))
        if self.max_drafts:
            most = self._num_logits(self.max_decode, self.max_prefill, drafts=True)
            for scored in (False, True):
                shapes.add(
                    self.shape(num_decode=self.max_decode, num_prefill=self.max_prefill, num_logits=most, scored=scored)
                )
        return sorted(shapes, key=_size)

    def _num_logits(self, decode: int, prefill: int, *, drafts: bool) -> int:
        """Logit rows of a shape: one per sequence that may sample, or with drafts one per token to verify."""
        if not drafts:
            return _at_least(self._logit_rows, decode + min(prefill, MAX_CHUNKS))
        return _power_of_two(decode + min(prefill, self.max_chunks) * (1 + self.max_drafts))


def _size(shape: StepShape) -> tuple[int, int, int, bool]:
    """Orders shapes by the time that their steps take."""
    return shape.num_tokens, shape.num_logits, shape.num_prefill, shape.scored


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
