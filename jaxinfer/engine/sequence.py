"""The state of a sequence: one request, or one beam, on its way through the engine.

Owns: its tokens, how many of them are computed, its slot and pages.
Does not know: queues, how steps are chosen, devices. Never imports jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.captured_values import CapturedValues
from jaxinfer.constraints.constraint import ConstraintState
from jaxinfer.request import FinishReason, Request, TokenLogprobs

NO_SLOT = -1


class SequenceKind(NamedTuple):
    """What a sequence asks of every step that it is part of. The sequences of a step are of few kinds.

    Args:
      num_top: as in SequenceState.
      is_random, is_filtered, is_edited, is_tapped: as in Request.
    """

    num_top: int | None
    is_random: bool
    is_filtered: bool
    is_edited: bool
    is_tapped: bool


@dataclass(eq=False, slots=True, weakref_slot=True)
class SequenceState:
    """The tokens of one request, and the slot and pages that it holds.

    Computed tokens catch up with known ones: of num_tokens tokens the first num_computed_tokens are computed, every
    step computes some of the others, and where it reaches the last one it samples another. The sequence then decodes:
    only its last token is not computed, and the device has that token, whether or not the host has read it.

    Args:
      request: the request.
      order: (priority, arrival, ..); smaller runs first and is preempted last.
      token_ids: the prompt and the output tokens that the host has read so far.
      max_total_len: the length at which the sequence ends, in tokens of prompt and output together.
      prefix_source: the sequence whose pages this one will share (another sample of the same prompt, or the beam it
        was forked from). None if there is none, and after admission, when the pages are shared already.
      num_top: how many of the most likely tokens to report at each position, beside the sampled one; None reports no
        log-probabilities at all.
      is_host_fed: the host chooses the next input (speculative decoding, beam search), so nothing is computed after a
        token before the host has read it.
      is_parked: the sequence pauses until the host extends it with a token.
      num_computed_tokens: leading positions whose keys and values are computed, or will be by a step already launched.
      num_on_device: how many tokens the sequence has by the device's count, which includes wrong drafts. The device has
        the last of these; 0 if the device has sampled none since admission or has to be given another one.
      num_unread: tokens sampled on the device that the host has not read yet.
      num_scored: leading prompt positions for which the next token's log-probability has been launched.
      last_sampled: number of the scheduler's step that last sampled a token for this sequence.
      slot: decode slot while running, else NO_SLOT.
      pages: KV pages in order while running.
      first_kept: the first page, the sink tokens' aside, that the sequence has not given back.
      page_hashes: hash chain over the full pages, as far as it has been needed.
      num_published: leading pages that were offered to the prefix cache.
      num_cached_tokens: prompt tokens found in the prefix cache at first admission; None before.
      num_skipped: how often younger requests have overtaken this one while it waited.
      prompt_logprobs: log-probabilities of the prompt's tokens from the second on, as far as read.
      constraint: tells which tokens may come next; None allows all.
      captured: the values inside the model that are kept, as far as read; None if the request captures none.
      finish_reason: why the sequence ended; None before.
      error: the exception of its constraint, if one ended it.
      kind: what it asks of its steps.
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
    num_on_device: int = 0
    num_unread: int = 0
    num_scored: int = 0
    last_sampled: int = 0
    slot: int = NO_SLOT
    pages: list[int] = field(default_factory=list)
    first_kept: int = 0
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached_tokens: int | None = None
    num_skipped: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    constraint: ConstraintState | None = None
    captured: CapturedValues | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    kind: SequenceKind = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.kind = SequenceKind(
            num_top=self.num_top,
            is_random=request.is_random,
            is_filtered=request.is_filtered,
            is_edited=request.is_edited,
            is_tapped=request.is_tapped,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, unread ones included."""
        return len(self.token_ids) + self.num_unread

    @property
    def is_decoding(self) -> bool:
        """Whether the device has the last token, so that a decode row can compute it.

        It has not after a wrong draft, after which it had sampled more than the sequence got.
        """
        return self.num_on_device == len(self.token_ids) + self.num_unread

    @property
    def is_ready(self) -> bool:
        """Whether only the last token is left to compute, so that the next step can sample."""
        return self.is_decoding or (self.is_host_fed and self.num_computed_tokens == len(self.token_ids) - 1)

    @property
    def is_prefilling(self) -> bool:
        """Whether a running sequence has other tokens to compute than its last one."""
        return not (self.is_ready or self.is_parked)

    @property
    def needs_single_steps(self) -> bool:
        """Whether the next steps have more to do for the sequence than to decode it."""
        return self.is_prefilling or self.is_host_fed or self.constraint is not None or self.kind.is_tapped

    @property
    def needs_other_steps(self) -> bool:
        """Whether there are steps for the sequence that do more than compute its tokens and sample."""
        return self.is_host_fed or self.kind.is_tapped or self.request.prompt_logprobs is not None

    @property
    def num_reusable(self) -> int:
        """How many leading tokens need not be computed if their keys and values are there already.

        The last token has to be computed, since the next one is sampled after it. Prompt positions that have yet to
        give a log-probability, and tokens whose values are to be captured, have to be computed as well.
        """
        limit = len(self.token_ids) - 1
        if self.request.prompt_logprobs is not None and self.num_scored < len(self.request.known_token_ids) - 1:
            limit = self.num_scored
        if self.captured is not None and self.captured.wanted(self.captured.end, limit):
            limit = self.captured.end
        return limit

    def compute_to(self, end: int, *, num_sampled: int, step: int) -> None:
        """Records that a step computes the tokens before position `end` and samples num_sampled, the last at `end`."""
        self.num_computed_tokens = end
        self.num_unread += num_sampled
        self.last_sampled = step
        if num_sampled:
            self.num_on_device = end + 1
