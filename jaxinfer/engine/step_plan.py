"""The step that is being put together.

Owns: what the step has room for, how the rows of a sequence are cut to it.
Does not know: queues, pages, which sequence comes first. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxinfer.engine.schedule import DecodeRow, PrefillChunk, Schedule
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK


@dataclass(slots=True)
class StepPlan:
    """The rows of a step so far, and the room that is left.

    Args:
      budget: tokens that the step may still take.
      num_rows: prefill rows (of PREFILL_BLOCK tokens) that it may still take.
      num_chunks: chunks that it may still take.
      splits_prompts: whether a prompt may be computed in several steps (chunked prefill).
    """

    budget: int
    num_rows: int
    num_chunks: int
    splits_prompts: bool
    _decodes: list[DecodeRow] = field(default_factory=list)
    _chunks: list[PrefillChunk] = field(default_factory=list)
    _page_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens that the next chunk may have; 0 if the step has no room for another one."""
        return min(self.budget, self.num_rows * PREFILL_BLOCK) if self.num_chunks else 0

    def chunk_len(self, num_left: int) -> int:
        """Tokens of the next chunk of a sequence with num_left tokens to compute; 0 if none fits."""
        length = min(num_left, self.room)
        return length if length == num_left or self.splits_prompts else 0

    def add_decode(self, sequence: SequenceState, new_page: tuple[int, int] | None) -> None:
        """Adds a decode row; new_page as in DecodeRow. The budget has been charged for it when the plan was made."""
        self._decodes.append(DecodeRow(sequence, sequence.slot, new_page, sequence.num_computed_tokens))

    def add_last_token(self, sequence: SequenceState, drafts: Sequence[int]) -> None:
        """Adds a chunk of a sequence's last token with drafts after it; like a decode row, the token is paid for."""
        token_ids = [sequence.token_ids[-1], *drafts]
        self._add(sequence, token_ids, num_sampled=len(token_ids), cost=len(drafts))

    def add_known_tokens(self, sequence: SequenceState) -> None:
        """Adds a chunk of the tokens that a sequence has to compute, as many as fit; nothing if none fits."""
        start, num_known = sequence.num_computed_tokens, len(sequence.token_ids)
        length = self.chunk_len(num_known - start)
        if length:
            token_ids = sequence.token_ids[start : start + length]
            self._add(sequence, token_ids, num_sampled=int(start + length == num_known), cost=length)

    def add_page_copies(self, copies: Iterable[tuple[int, int]]) -> None:
        """Adds (source, destination) pages to copy before anything is computed."""
        self._page_copies += copies

    def schedule(self) -> Schedule:
        """The rows so far as a schedule."""
        return Schedule(tuple(self._decodes), tuple(self._chunks), tuple(self._page_copies))

    def _add(self, sequence: SequenceState, token_ids: Sequence[int], *, num_sampled: int, cost: int) -> None:
        start = sequence.num_computed_tokens
        chunk = PrefillChunk(
            sequence,
            sequence.slot,
            start,
            token_ids,
            tuple(sequence.pages),
            num_sampled=num_sampled,
            scored=_scored(sequence, start, start + len(token_ids)),
        )
        self._chunks.append(chunk)
        self.budget -= cost
        self.num_rows -= chunk.num_rows
        self.num_chunks -= 1


def _scored(sequence: SequenceState, start: int, end: int) -> range:
    """The positions of a chunk that are followed by a prompt token without a log-probability yet."""
    if sequence.request.prompt_logprobs is None:
        return range(0)
    first = max(start, sequence.num_scored)
    return range(first, max(first, min(end, len(sequence.request.known_token_ids) - 1)))
