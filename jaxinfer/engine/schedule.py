"""What runs in a step, and whose it is.

Owns: the life of a sequence as data (tokens, slot, pages) and the rows of a schedule.
Does not know: queues, how rows are chosen, devices. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from jaxinfer.constraints.constraint import ConstraintState
from jaxinfer.request import FinishReason, Request, TokenLogprobs
from jaxinfer.wrappers.step_batch import num_blocks

NO_SLOT = -1


@dataclass(eq=False, slots=True, weakref_slot=True)
class SequenceState:
    """One request's tokens and what it holds.

    Args:
      request: what was asked.
      order: (priority, arrival, ..); smaller runs first and is preempted last.
      token_ids: prompt and the tokens read so far.
      limit: tokens at which it ends.
      leader: one whose first tokens are the same, up to this one's last, so that its pages can be shared; None for
        nobody, or once admitted.
      num_top: report log-probabilities, and those of so many of the most likely tokens; None for none.
      is_host_fed: the host decides what follows a token, so that nothing is launched behind one it has not read.
      is_parked: nothing is to be computed until the host says how it goes on.
      num_computed: positions whose keys have been launched.
      is_decoding: all keys but the last token's are launched, and the device has that token.
      num_unread: tokens sampled on the device but not yet read.
      num_scored: leading prompt positions whose next token's log-probability was launched.
      last_sampled: the scheduler's step that last sampled a token of it.
      slot: decode slot while running, else NO_SLOT.
      pages: KV pages in order while running.
      page_hashes: chain over its full pages, as far as computed.
      num_published: leading pages that were offered to the prefix cache.
      num_cached_tokens: prompt tokens found in the prefix cache at first admission; None before.
      num_skipped: how often younger requests overtook it while waiting.
      prompt_logprobs: of its prompt from the second token on, as far as read.
      constraint: which tokens may come next; None for all.
      finish_reason: set when it ended.
      error: what its constraint raised, if that ended it.
    """

    request: Request
    order: tuple[int, ...]
    token_ids: list[int]
    limit: int
    leader: SequenceState | None = None
    num_top: int | None = None
    is_host_fed: bool = False
    is_parked: bool = False
    num_computed: int = 0
    is_decoding: bool = False
    num_unread: int = 0
    num_scored: int = 0
    last_sampled: int = 0
    slot: int = NO_SLOT
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached_tokens: int | None = None
    num_skipped: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    constraint: ConstraintState | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens it has, unread ones included."""
        return len(self.token_ids) + self.num_unread

    @property
    def is_ready(self) -> bool:
        """Whether only the last token's key is missing, so that computing it gives the next token."""
        return self.is_decoding or (self.is_host_fed and self.num_computed == len(self.token_ids) - 1)

    @property
    def num_reusable(self) -> int:
        """Leading tokens that may come from the prefix cache: not the last one, and none that has yet to be scored."""
        if self.request.prompt_logprobs is None or self.num_scored >= len(self.request.prompt_token_ids) - 1:
            return len(self.token_ids) - 1
        return self.num_scored


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token of a decoding sequence, which the device has.

    Args:
      sequence: whose.
      slot: its slot at the time.
      new_page: (index in its page table, page) that the token needs, or None.
    """

    num_sampled: ClassVar[int] = 1
    drafts: ClassVar[Sequence[int]] = ()
    sequence: SequenceState
    slot: int
    new_page: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive known tokens of a sequence, or its last one with drafts behind it.

    Args:
      sequence: whose.
      slot: its slot at the time.
      start: position of the first token.
      token_ids: the tokens.
      pages: all pages of the sequence.
      num_sampled: of its last tokens, behind how many one is sampled: 0 amid a text, 1 at its end, all with drafts.
      scored: positions whose next token's log-probability is asked for.
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
        """Rows of the prefill segment."""
        return num_blocks(len(self.token_ids))

    @property
    def drafts(self) -> Sequence[int]:
        """The tokens that are only proposed."""
        return self.token_ids[1:] if self.num_sampled > 1 else ()


SampledRows = DecodeRow | PrefillChunk
"""Whose num_sampled logit rows follow each other; drafts are the tokens proposed behind each but the last."""


@dataclass(frozen=True)
class Schedule:
    """The work of one step.

    Args:
      decodes, prefills: the rows.
      page_copies: (source, destination) pages to copy first.
    """

    decodes: tuple[DecodeRow, ...]
    prefills: tuple[PrefillChunk, ...]
    page_copies: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @cached_property
    def sampled(self) -> tuple[SampledRows, ...]:
        """Who samples, in the order of the step's logit rows."""
        return (*self.decodes, *(chunk for chunk in self.prefills if chunk.num_sampled))
