"""The work of one step: rows that compute tokens of sequences.

Owns: the kinds of rows.
Does not know: queues, how rows are chosen, devices. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxinfer.engine.sequence import SequenceKind, SequenceState
from jaxinfer.wrappers.step_shapes import num_blocks


class DecodeRow(NamedTuple):
    """One decode row: computes a sequence's last token, which is on the device already, and samples the next.

    A named tuple, since every step makes one for every sequence, and it takes half the time of a frozen dataclass.

    Args:
      sequence: the sequence.
      slot: its slot when the step was scheduled.
      new_page: (index in its page table, page) if the token begins a new page, else None.
      position: index of the token in its text.
    """

    sequence: SequenceState
    slot: int
    new_page: tuple[int, int] | None
    position: int
    # As PrefillChunk's, and the same for all decode rows: without annotations they are no fields.
    num_sampled = 1
    drafts = ()


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of a sequence to compute: a piece of its prompt, or its last token with drafts after it.

    Args:
      sequence: the sequence.
      slot: its slot when the step was scheduled.
      start: position of the first token.
      token_ids: the tokens.
      pages: all pages of the sequence.
      num_sampled: after how many of the chunk's tokens, counted from its end, a token is sampled: 0 if more of the
        prompt follows, 1 at the end of the known tokens, all of them with drafts.
      scored: positions for which the next token's log-probability is wanted.
    """

    sequence: SequenceState
    slot: int
    start: int
    token_ids: Sequence[int]
    pages: tuple[int, ...]
    num_sampled: int
    scored: range = range(0)

    @property
    def num_rows(self) -> int:
        """Prefill rows that the chunk takes: 40 tokens take 3, of 16, 16 and 8 tokens."""
        return num_blocks(len(self.token_ids))

    @property
    def drafts(self) -> Sequence[int]:
        """The tokens that are drafts, to be verified by this step."""
        return self.token_ids[1:] if self.num_sampled > 1 else ()


SamplingRows = DecodeRow | PrefillChunk
"""What samples in a step: num_sampled logit rows, one after the other. drafts[i] is the guess for what row i samples;
the last row has no guess."""


def num_right(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of the drafts are what was sampled in their places, up to the first wrong one."""
    return next((i for i, draft in enumerate(drafts) if draft != sampled[i]), len(drafts))


@dataclass(frozen=True)
class Schedule:
    """The work of one step.

    Args:
      decodes: sequences that decode one token each.
      prefills: chunks of several tokens.
      page_copies: (source, destination) pages to copy before anything is computed.
    """

    decodes: tuple[DecodeRow, ...]
    prefills: tuple[PrefillChunk, ...]
    page_copies: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @cached_property
    def sampled(self) -> tuple[SamplingRows, ...]:
        """The decode rows and the chunks that sample, in the order of the step's logit rows."""
        return (*self.decodes, *(chunk for chunk in self.prefills if chunk.num_sampled))

    @property
    def sampled_kinds(self) -> frozenset[SequenceKind]:
        """The kinds of sequences that sample."""
        return self._decode_kinds.union(chunk.sequence.kind for chunk in self.prefills if chunk.num_sampled)

    @property
    def kinds(self) -> frozenset[SequenceKind]:
        """The kinds of all sequences."""
        return self._decode_kinds.union(chunk.sequence.kind for chunk in self.prefills)

    @cached_property
    def _decode_kinds(self) -> frozenset[SequenceKind]:
        return frozenset([row.sequence.kind for row in self.decodes])
