"""The scheduler: chooses what runs in the next step.

Owns: who runs and who waits, admission with bounded skip-ahead, preemption by recomputation.
Does not know: devices, arrays, text. Never imports jax.

Every step lets computed tokens catch up with known ones (see SequenceState). Sequences that decode come first, then
prompts that are partly computed, then waiting ones, the oldest first in each group; a StepPlan holds the room that is
left. Where pages run out, the newest running sequence is preempted: it waits again and is computed anew.

The host launches steps before it has read the tokens of earlier ones, so a sequence may have tokens that are sampled
but not yet read (num_unread). A running sequence can be scheduled again nevertheless, since its next input is already
on the device. A preempted sequence has to wait until all its tokens are read, and so has a host-fed one (speculative
decoding, beam search), whose next input the host chooses.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence

from jaxinfer.captured_values import CapturedValues
from jaxinfer.config.attention_span import WHOLE_TEXT, AttentionSpan
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.coming_steps import Work, coming_shapes
from jaxinfer.engine.ending import end_reason, start_constraint
from jaxinfer.engine.page_allocator import PageAllocator
from jaxinfer.engine.pages_in_sight import PagesInSight
from jaxinfer.engine.request_limits import RequestLimits
from jaxinfer.engine.schedule import Schedule, num_right
from jaxinfer.engine.sequence import NO_SLOT, SequenceState
from jaxinfer.engine.sequence_pages import SequencePages
from jaxinfer.engine.step_plan import StepPlan
from jaxinfer.engine.turns import Turns
from jaxinfer.engine.waiting import WaitingQueue
from jaxinfer.request import FinishReason, Request
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes

MAX_SKIPS = 16
"""How often younger requests may overtake the first waiting one that does not fit yet."""
SKIP_WINDOW = 8
"""How many more waiting requests may fail to fit, after the first one, before a step stops admitting."""
NUM_FORESEEN = 32
"""How many waiting requests coming_shapes looks at."""


class Scheduler:
    """Chooses the work of each step: first come, first served within a priority.

    Args:
      config: the engine's settings.
      shapes: the shapes of steps, which bound how many rows and chunks a step can have.
      num_pages: pages of the KV pool, without the dump page.
      max_model_len: limit on the tokens of prompt and output together.
      span: what tokens see of their text; pages that are out of sight are given back.
      plan_drafts: given a sequence and a maximum, returns the drafts to verify after its last token, as
        Drafter.plan does; None never drafts.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        shapes: StepShapes,
        num_pages: int,
        max_model_len: int,
        span: AttentionSpan = WHOLE_TEXT,
        plan_drafts: Callable[[SequenceState, int], Sequence[int]] | None = None,
    ):
        in_sight = PagesInSight(span, page_size=config.page_size, max_chunk=config.max_num_batched_tokens)
        self.limits = RequestLimits(config, in_sight=in_sight, num_pages=num_pages, max_model_len=max_model_len)
        self._config = config
        self._shapes = shapes
        self._plan_drafts = plan_drafts
        self._pages = SequencePages(num_pages, in_sight=in_sight, caching=config.enable_prefix_caching)
        self._turns = Turns(config, shapes)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._running: list[SequenceState] = []  # oldest first
        self._waiting = WaitingQueue()
        self._arrivals = itertools.count()
        self._step = 0
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    @property
    def pages(self) -> PageAllocator:
        """The allocator of the KV pages."""
        return self._pages.allocator

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot, those that wait for their prefix source's prompt included."""
        return len(self._waiting) + self._waiting.num_followers

    def num_cached_pages(self, page_hashes: Sequence[bytes]) -> int:
        """See DynamicEngine.num_cached_pages."""
        return self._pages.num_cached(page_hashes)

    def add(
        self,
        request: Request,
        *,
        prefix_source: SequenceState | None = None,
        num_top: int | None = None,
        is_host_fed: bool = False,
    ) -> SequenceState:
        """Queues a request.

        Args:
          request: the request.
          prefix_source: a sequence with the same prompt. The new sequence waits until that prompt is computed, then
            shares its pages.
          num_top: as in SequenceState; None takes request.logprobs.
          is_host_fed: as in SequenceState.

        Raises:
          ValueError: the request could never run (see RequestLimits), or its constraint allows no first token.
        """
        self.limits.check(request)
        sequence = SequenceState(
            request=request,
            order=(request.priority, next(self._arrivals)),
            token_ids=list(request.known_token_ids),
            max_total_len=self.limits.max_total_len(request),
            prefix_source=prefix_source,
            num_top=request.logprobs if num_top is None else num_top,
            is_host_fed=is_host_fed,
            constraint=start_constraint(request),
            captured=None if request.capture is None else CapturedValues(request.capture.sites, request.capture.span),
        )
        if (
            prefix_source is not None
            and prefix_source.finish_reason is None
            and prefix_source.num_computed_tokens < len(sequence.token_ids) - 1
        ):
            self._waiting.follow(sequence, prefix_source)
        else:
            self._waiting.push(sequence)
        return sequence

    def fork(self, sequence: SequenceState, token_id: int) -> SequenceState:
        """Queues a copy of a sequence, continued by a token; beam search calls it where one beam becomes several.

        The sequence must be host-fed and all its tokens must be read. The copy shares its pages when it is admitted.
        """
        copy = SequenceState(
            request=sequence.request,
            order=(*sequence.order[:2], next(self._arrivals)),
            token_ids=[*sequence.token_ids, token_id],
            max_total_len=sequence.max_total_len,
            prefix_source=sequence,
            num_top=sequence.num_top,
            is_host_fed=True,
            page_hashes=list(sequence.page_hashes),
            num_cached_tokens=sequence.num_cached_tokens,
        )
        self._waiting.push(copy)
        return copy

    def park(self, sequence: SequenceState) -> None:
        """Records that a host-fed sequence's tokens are read, and lets it pause until extend is called."""
        sequence.num_unread = 0
        sequence.is_parked = True

    def extend(self, sequence: SequenceState, token_id: int) -> None:
        """Lets a parked sequence continue with the token that the host has chosen."""
        sequence.token_ids.append(token_id)
        sequence.is_parked, sequence.num_on_device = False, 0

    def schedule(self) -> Schedule:
        """Chooses the rows of the next step and allocates their pages.

        A PrefillChunk with several sampled tokens holds the drafts that plan_drafts returned.
        """
        self._step += 1
        schedule = self._fill_step()
        while not schedule and self._break_deadlock():
            schedule = self._fill_step()
        self._commit(schedule)
        return schedule

    def only_decodes(self, num_steps: int) -> bool:
        """Whether so many more steps have something to decode and nothing else to do, if no sequence ends early.

        At least one sequence has so many tokens to go. No request waits, no prompt is being computed, nothing is
        captured or changed inside the model, no page has to be taken from anybody, and no token has to be read by the
        host before the next one is computed.
        """
        if self.num_waiting or any(sequence.needs_single_steps for sequence in self._running):
            return False
        ends = [(s, min(s.num_computed_tokens + num_steps, s.max_total_len)) for s in self._running]
        missing = sum(self._pages.num_missing(sequence, end) for sequence, end in ends)
        lasts = any(sequence.num_tokens + num_steps <= sequence.max_total_len for sequence in self._running)
        return lasts and missing <= self.pages.num_available

    def coming_shapes(self) -> list[StepShape]:
        """The shapes of the steps after the last one scheduled, as far as they can be foreseen.

        None in a pipeline, nor while a sequence is fed by the host or captures values or the like: its steps have
        shapes or programs of their own.
        """
        waiting = self._waiting.first(NUM_FORESEEN)
        if self._shapes.num_stages > 1 or any(s.needs_other_steps for s in (*self._running, *waiting)):
            return []
        in_slots = [_work(s, s.num_computed_tokens) for s in self._running]
        return coming_shapes(self._shapes, in_slots, [_work(s, self._pages.find_prefix(s).num_tokens) for s in waiting])

    def append(self, sequence: SequenceState, sampled: Sequence[int], drafts: Sequence[int] = ()) -> int:
        """Records tokens that the host has read and decides whether the sequence has ended.

        Args:
          sequence: the sequence.
          sampled: the tokens sampled after its last token and after each draft, one more than there are drafts.
          drafts: the drafts that were verified. A sampled token counts only if all drafts before it were right: of
            sampled tokens 5, 8, 2 with drafts 5, 7 the sequence gets 5 and 8.

        Returns:
          How many of the sampled tokens the sequence got; it may end before all that count.
        """
        sequence.num_unread -= len(sampled)
        if not drafts:
            self._append(sequence, sampled[0])
            return 1
        right = num_right(drafts, sampled)
        if right < len(drafts) and sequence.slot != NO_SLOT:
            sequence.num_computed_tokens = len(sequence.token_ids) + right
        num_new = 0
        while num_new <= right and sequence.finish_reason is None:
            self._append(sequence, sampled[num_new])
            num_new += 1
        if sequence.slot != NO_SLOT:
            self._pages.give_back_unused(sequence)
        return num_new

    def finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        """Ends a running or waiting sequence and frees its slot and pages; its unread tokens will be dropped."""
        sequence.finish_reason = reason
        if sequence.slot != NO_SLOT:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        self._waiting.let_follow(sequence)

    def _append(self, sequence: SequenceState, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        reason = end_reason(sequence)
        if reason is not None:
            self.finish(sequence, reason)
        elif sequence.slot != NO_SLOT:
            self._pages.publish(sequence)

    def _fill_step(self) -> Schedule:
        prefilling = [sequence for sequence in self._running if sequence.is_prefilling]
        for sequence in prefilling:  # before the plan has any rows, since _grow may preempt their sequences
            if sequence.slot != NO_SLOT:  # else an older sequence has preempted it in this loop
                self._pages.give_back_unseen(sequence)
                self._grow(sequence, self._pages.next_end(sequence))
        decoding = self._turns.to_decode(self._running, step=self._step)
        num_chunks = sum(sequence.is_host_fed for sequence in decoding)
        num_free_slots = len(self._free_slots)
        num_rows = self._turns.num_prefill_rows(self._running, self._waiting, num_free_slots=num_free_slots)
        plan = StepPlan(
            budget=self._config.max_num_batched_tokens - len(decoding),
            num_rows=min(num_rows + num_chunks, self._shapes.max_prefill),
            num_chunks=self._shapes.max_chunks,
            splits_prompts=self._config.enable_chunked_prefill,
        )
        for sequence in decoding:
            if sequence.slot != NO_SLOT:  # else an older sequence has preempted it in this loop
                self._add_ready(plan, sequence)
        for sequence in prefilling:
            if sequence.slot != NO_SLOT:
                plan.add_known_tokens(sequence)
        self._admit(plan)
        return plan.schedule()

    def _commit(self, schedule: Schedule) -> None:
        """Records in the sequences what the step will have computed and sampled."""
        for row in schedule.decodes:
            row.sequence.compute_to(row.sequence.num_computed_tokens + 1, num_sampled=1, step=self._step)
        for chunk in schedule.prefills:
            sequence = chunk.sequence
            sequence.compute_to(chunk.start + len(chunk.token_ids), num_sampled=chunk.num_sampled, step=self._step)
            sequence.num_scored = max(sequence.num_scored, chunk.scored.stop)
            self._pages.publish(sequence)
            if chunk.num_sampled:
                self._waiting.let_follow(sequence)

    def _add_ready(self, plan: StepPlan, sequence: SequenceState) -> None:
        """Adds a ready sequence: a decode row, or a chunk if it has drafts or the device lacks its last token."""
        self._pages.give_back_unseen(sequence)
        drafts = self._drafts(plan, sequence) if sequence.is_host_fed else ()
        end, num_pages = sequence.num_computed_tokens + 1 + len(drafts), len(sequence.pages)
        if sequence.is_decoding and not drafts:
            if self._grow(sequence, end):
                plan.add_decode(sequence, (num_pages, sequence.pages[-1]) if len(sequence.pages) > num_pages else None)
        elif plan.num_rows and self._grow(sequence, end):
            plan.add_last_token(sequence, drafts)

    def _drafts(self, plan: StepPlan, sequence: SequenceState) -> Sequence[int]:
        """Drafts for the step to verify, as many as sequence limit, budget, one prefill row and free pages allow."""
        if self._plan_drafts is None:
            return ()
        most = min(sequence.max_total_len - 1, self._pages.most_tokens(sequence)) - len(sequence.token_ids)
        return self._plan_drafts(sequence, max(min(most, plan.budget, PREFILL_BLOCK - 1), 0))

    def _grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Allocates the pages for a length, preempting the newest running sequences while too few are available.

        Returns:
          False if the sequence was itself the newest and has been preempted.
        """
        missing = self._pages.num_missing(sequence, num_tokens)
        if not missing:
            return True
        while missing > self.pages.num_available:
            newest = self._running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        self._pages.grow(sequence, missing)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.num_preemptions += 1
        self._stop_running(sequence)
        self._waiting.push(sequence)

    def _break_deadlock(self) -> bool:
        """Preempts the newest parked sequence if nothing can run until parked ones give up slots or pages.

        Returns:
          Whether a sequence was preempted.
        """
        parked = [sequence for sequence in self._running if sequence.is_parked]
        if not parked or any(sequence.num_unread for sequence in (*self._running, *self._waiting)):
            return False
        if all(sequence.is_parked for sequence in self._waiting):
            return False
        self._preempt(parked[-1])
        return True

    def _stop_running(self, sequence: SequenceState) -> None:
        self._pages.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.num_on_device = NO_SLOT, 0
        self._running.remove(sequence)

    def _admit(self, plan: StepPlan) -> None:
        """Admits waiting sequences; a few younger ones may overtake one that does not fit yet."""
        skipped: list[SequenceState] = []
        aside: list[SequenceState] = []
        num_reserved = self._pages.num_reserved(self._running) if self._waiting and self._free_slots else 0
        while self._waiting and self._free_slots and plan.room:
            if len(skipped) > SKIP_WINDOW or (skipped and skipped[0].num_skipped >= MAX_SKIPS):
                break
            sequence = self._waiting.pop()
            if sequence.num_unread or sequence.is_parked:
                aside.append(sequence)
            elif not self._add_waiting(plan, sequence, num_reserved):
                skipped.append(sequence)
            else:
                num_reserved = self._pages.num_reserved(self._running)
                if skipped:
                    skipped[0].num_skipped += 1
        for sequence in (*skipped, *aside):
            self._waiting.push(sequence)

    def _add_waiting(self, plan: StepPlan, sequence: SequenceState, num_reserved: int) -> bool:
        """Admits a waiting sequence if its first chunk fits, and its pages beside those reserved for running ones."""
        prefix = self._pages.find_prefix(sequence)
        if self._pages.num_taken(sequence, prefix) > self.pages.num_available - num_reserved:
            return False
        if not plan.chunk_len(len(sequence.token_ids) - prefix.num_tokens):
            return False
        plan.add_page_copies(self._pages.take(sequence, prefix))
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = len(prefix.pages) * self._config.page_size
            if sequence.prefix_source is None:
                self.prefix_cache_queries += len(sequence.token_ids)
                self.prefix_cache_hits += sequence.num_cached_tokens
        sequence.slot, sequence.prefix_source = self._free_slots.pop(), None
        sequence.num_skipped = 0
        bisect.insort(self._running, sequence, key=lambda running: running.order)
        plan.add_known_tokens(sequence)
        return True


def _work(sequence: SequenceState, num_computed: int) -> Work:
    """What is left to do for a sequence of whose tokens so many are computed."""
    left = sequence.max_total_len - sequence.num_tokens
    if not sequence.is_prefilling:
        return Work(0, left)
    return Work(sequence.num_tokens - num_computed, left - 1)  # the step that computes the last one samples another
