"""The data of the scheduler: sequences, and the rows that a step computes.

Owns: the state of a sequence (tokens, slot, pages) and the rows of a schedule.
Does not know: queues, how rows are chosen, devices. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from jaxinfer.constraints.constraint import ConstraintState
from jaxinfer.request import FinishReason, Request, TokenLogprobs
from jaxinfer.wrappers.step_shapes import num_blocks

NO_SLOT = -1


@dataclass(eq=False, slots=True, weakref_slot=True)
class SequenceState:
    """The tokens of one request, and the slot and pages that it holds.

    Args:
      request: the request.
      order: (priority, arrival, ..); smaller runs first and is preempted last.
      token_ids: the prompt and the output tokens that the host has read so far.
      max_total_len: the length at which the sequence ends, in tokens of prompt and output together.
      prefix_source: the sequence whose pages this one will share (another sample of the same prompt, or the beam it
        was forked from). None if there is none, and after admission, when the pages are shared already.
      num_top: how many of the most likely tokens to report at each position, beside the sampled one; None reports no
        log-probabilities at all.
      is_host_fed: the host chooses the next input (speculative decoding, beam search), so nothing is computed behind a
        token before the host has read it.
      is_parked: the sequence pauses until the host extends it with a token.
      num_computed_tokens: leading positions whose keys and values are computed, or will be by a step already launched.
      is_decoding: the device has the last token, and it is the only one whose key is not computed.
      num_unread: tokens sampled on the device that the host has not read yet.
      num_scored: leading prompt positions for which the next token's log-probability has been launched.
      last_sampled: number of the scheduler's step that last sampled a token for this sequence.
      slot: decode slot while running, else NO_SLOT.
      pages: KV pages in order while running.
      page_hashes: hash chain over the full pages, as far as it has been needed.
      num_published: leading pages that were offered to the prefix cache.
      num_cached_tokens: prompt tokens found in the prefix cache at first admission; None before.
      num_skipped: how often younger requests have overtaken this one while it waited.
      prompt_logprobs: log-probabilities of the prompt's tokens from the second on, as far as read.
      constraint: tells which tokens may come next; None allows all.
      finish_reason: why the sequence ended; None before.
      error: the exception of its constraint, if one ended it.
    """

    request: Request
    order: tuple[int, ...]
    token_ids: list[int]
    max_total_len: int
    prefix_source: SequenceState | None = None
    num_top: int | None = None
    is_host_fed: bool = False
    is_parked: bool = False
    num_computed_tokens: int = 0
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
        """Tokens of the sequence, unread ones included."""
        return len(self.token_ids) + self.num_unread

    @property
    def is_ready(self) -> bool:
        """Whether only the last token is left to compute, so that the next step can sample."""
        return self.is_decoding or (self.is_host_fed and self.num_computed_tokens == len(self.token_ids) - 1)

    @property
    def num_reusable(self) -> int:
        """How many leading tokens may come from the prefix cache.

        The last token has to be computed, since the next one is sampled behind it. Prompt positions that have yet to
        give a log-probability have to be computed as well.
        """
        if self.request.prompt_logprobs is None or self.num_scored >= len(self.request.prompt_token_ids) - 1:
            return len(self.token_ids) - 1
        return self.num_scored


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One decode row: computes a sequence's last token, which is on the device already, and samples the next.

    Args:
      sequence: the sequence.
      slot: its slot when the step was scheduled.
      new_page: (index in its page table, page) if the token begins a new page, else None.
    """

    num_sampled: ClassVar[int] = 1
    drafts: ClassVar[Sequence[int]] = ()
    sequence: SequenceState
    slot: int
    new_page: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of a sequence to compute: a piece of its prompt, or its last token with drafts behind it.

    Args:
      sequence: the sequence.
      slot: its slot when the step was scheduled.
      start: position of the first token.
      token_ids: the tokens.
      pages: all pages of the sequence.
      num_sampled: behind how many of the chunk's tokens, counted from its end, a token is sampled: 0 if more of the
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
