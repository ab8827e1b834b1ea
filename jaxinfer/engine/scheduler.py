"""The scheduler: chooses what runs in the next step.

Owns: the queues, the token budget, chunked prefill, admission with bounded skip-ahead, preemption by recomputation.
Does not know: devices, arrays, text. Never imports jax.

In a pipeline of S stages a token is sampled when its step leaves the last stage. A sequence can therefore decode in
every S-th step only, and the sequences are spread over the steps. With one stage, all of them decode in every step.

The host launches steps before it has read the tokens of earlier ones, so a sequence may have tokens that are sampled
but not yet read (num_unread). A running sequence can be scheduled again nevertheless, since its next input is already
on the device. A preempted sequence has to wait until all its tokens are read, and so has a host-fed one (speculative
decoding, beam search), whose next input the host chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.ending import end_reason, start_constraint
from jaxinfer.engine.page_allocator import PageAllocator
from jaxinfer.engine.schedule import DecodeRow, PrefillChunk, Schedule
from jaxinfer.engine.sequence import NO_SLOT, SequenceState
from jaxinfer.engine.sequence_pages import SequencePages
from jaxinfer.engine.waiting import WaitingQueue
from jaxinfer.request import FinishReason, Request, RequestTooLongError
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShapes, num_blocks, pages_for

MAX_SKIPS = 16
"""How often younger requests may overtake the first waiting one that does not fit yet."""
SKIP_WINDOW = 8
"""How many more waiting requests may fail to fit, behind the first one, before a step stops admitting."""


@dataclass(slots=True)
class _Step:
    """The step being put together.

    Args:
      budget: tokens that the step may still take.
      num_rows: prefill rows (of PREFILL_BLOCK tokens) that it may still take.
      num_chunks: chunks that it may still take.
      decodes, chunks, page_copies: what it has taken so far, as in Schedule.
    """

    budget: int
    num_rows: int
    num_chunks: int
    decodes: list[DecodeRow] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens that the next chunk may have; 0 if the step has no room for another one."""
        return min(self.budget, self.num_rows * PREFILL_BLOCK) if self.num_chunks else 0

    def add(self, chunk: PrefillChunk, *, cost: int) -> None:
        """Adds a chunk and takes `cost` tokens from the budget."""
        self.chunks.append(chunk)
        self.budget -= cost
        self.num_rows -= chunk.num_rows
        self.num_chunks -= 1


class Scheduler:
    """Chooses the work of each step: first come, first served within a priority.

    Args:
      config: the engine's settings.
      shapes: the shapes of steps, which bound how many rows and chunks a step can have.
      num_pages: pages of the KV pool, without the dump page.
      max_model_len: limit on the tokens of prompt and output together.
      plan_drafts: given a sequence and a maximum, returns the drafts to verify behind its last token, as
        Drafter.plan does; None never drafts.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        shapes: StepShapes,
        num_pages: int,
        max_model_len: int,
        plan_drafts: Callable[[SequenceState, int], Sequence[int]] | None = None,
    ):
        self._config = config
        self._shapes = shapes
        self._max_model_len = max_model_len
        self._plan_drafts = plan_drafts
        self._pages = SequencePages(num_pages, page_size=config.page_size, caching=config.enable_prefix_caching)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._running: list[SequenceState] = []
        self._waiting = WaitingQueue()
        self._followers: dict[
            SequenceState, dict[SequenceState, None]
        ] = {}  # by prefix source: who waits, oldest first
        self._arrivals = itertools.count()
        self._num_stages = shapes.num_stages
        # Every host-fed sequence may take a chunk. One chunk is kept for prompts, or they could be starved.
        self._max_ready_chunks = max(min(shapes.max_chunks, shapes.max_prefill) - 1, 1)
        self._step = 0
        self._prefill_share = 0
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
        return len(self._waiting) + sum(map(len, self._followers.values()))

    def check_fits(self, request: Request, *, num_sequences: int = 1) -> None:
        """Refuses a request that could not run even if nothing else did.

        Args:
          request: the request.
          num_sequences: how many sequences of its length have to run at the same time (the width of a beam search).

        Raises:
          RequestTooLongError: the prompt leaves no room for a new token, or the request needs more pages than the
            pool has.
        """
        num_prompt = len(request.prompt_token_ids)
        if num_prompt >= self._max_model_len:
            is_models_own = self._config.max_model_len is None
            context = "the model's context of" if is_models_own else "max_model_len"
            ways_out = "shorten it or set truncate_prompt_tokens"
            if not is_models_own:
                ways_out = "shorten it, set truncate_prompt_tokens or raise max_model_len, up to the model's context"
            raise RequestTooLongError(
                f"prompt has {num_prompt} tokens, the limit is {self._max_model_len - 1} ({context} "
                f"{self._max_model_len} less one for the output); {ways_out}"
            )
        needed = pages_for(self.max_total_len(request), self._config.page_size) * num_sequences
        if needed > self.pages.num_pages:
            times = "" if num_sequences == 1 else f"{num_sequences} x "
            raise RequestTooLongError(
                f"request needs {needed} KV pages for {times}{self.max_total_len(request)} tokens, the pool has "
                f"{self.pages.num_pages}; lower max_tokens, shorten the prompt or raise num_kv_pages"
            )

    def max_total_len(self, request: Request) -> int:
        """The length at which a request ends, in tokens of prompt and output together."""
        return min(len(request.prompt_token_ids) + request.max_tokens, self._max_model_len)

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
          ValueError: the request could never run (see check_fits), or its constraint allows no first token.
        """
        self.check_fits(request)
        sequence = SequenceState(
            request=request,
            order=(request.priority, next(self._arrivals)),
            token_ids=list(request.prompt_token_ids),
            max_total_len=self.max_total_len(request),
            prefix_source=prefix_source,
            num_top=request.logprobs if num_top is None else num_top,
            is_host_fed=is_host_fed,
            constraint=start_constraint(request),
        )
        if (
            prefix_source is not None
            and prefix_source.finish_reason is None
            and prefix_source.num_computed_tokens < len(sequence.token_ids) - 1
        ):
            self._followers.setdefault(prefix_source, {})[sequence] = None
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
        sequence.is_parked = sequence.is_decoding = False

    def schedule(self) -> Schedule:
        """Chooses the rows of the next step and allocates their pages.

        Sequences that decode come first, then prompts that are partly computed, then waiting ones; the oldest first in
        each group. A PrefillChunk with several sampled tokens holds the drafts that plan_drafts returned.
        """
        self._step += 1
        step = self._fill_step()
        while not (step.decodes or step.chunks) and self._break_deadlock():
            step = self._fill_step()
        self._commit(step)
        return Schedule(tuple(step.decodes), tuple(step.chunks), tuple(step.page_copies))

    def append(self, sequence: SequenceState, sampled: Sequence[int], drafts: Sequence[int] = ()) -> int:
        """Records tokens that the host has read and decides whether the sequence has ended.

        Args:
          sequence: the sequence.
          sampled: the tokens sampled behind its last token and behind each draft, one more than there are drafts.
          drafts: the drafts that were verified. A sampled token counts only if all drafts before it were right: of
            sampled tokens 5, 8, 2 with drafts 5, 7 the sequence gets 5 and 8.

        Returns:
          How many of the sampled tokens the sequence got; it may end before all that count.
        """
        sequence.num_unread -= len(sampled)
        if not drafts:
            self._append(sequence, sampled[0])
            return 1
        num_right = next((i for i, draft in enumerate(drafts) if draft != sampled[i]), len(drafts))
        if num_right < len(drafts) and sequence.slot != NO_SLOT:
            sequence.num_computed_tokens = len(sequence.token_ids) + num_right
            sequence.is_decoding = False
        num_new = 0
        while num_new <= num_right and sequence.finish_reason is None:
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
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence.prefix_source is not None:
            del self._followers[sequence.prefix_source][sequence]
        self._let_follow(sequence)

    def _append(self, sequence: SequenceState, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        reason = end_reason(sequence)
        if reason is not None:
            self.finish(sequence, reason)
        elif sequence.slot != NO_SLOT:
            self._pages.publish(sequence)

    def _let_follow(self, prefix_source: SequenceState) -> None:
        """Queues the sequences that waited for a prefix source's prompt."""
        for follower in self._followers.pop(prefix_source, ()):
            self._waiting.push(follower)

    def _fill_step(self) -> _Step:
        due = self._choose_ready()
        num_chunks = sum(not sequence.is_decoding or sequence.is_host_fed for sequence in due)
        step = _Step(
            budget=self._config.max_num_batched_tokens - len(due),
            num_rows=min(self._share_of_prefill() + num_chunks, self._shapes.max_prefill),
            num_chunks=self._shapes.max_chunks,
        )
        for sequence in due:
            if sequence.slot != NO_SLOT:  # else an older sequence has preempted it in this loop
                self._add_ready(step, sequence)
        for sequence in sorted(self._running, key=lambda sequence: sequence.order):
            if not (sequence.is_ready or sequence.is_parked):
                self._add_chunk(step, sequence)
        self._admit(step)
        return step

    def _commit(self, step: _Step) -> None:
        """Records in the sequences what the step will have computed and sampled."""
        for row in step.decodes:
            row.sequence.num_computed_tokens += 1
            row.sequence.num_unread += 1
            row.sequence.last_sampled = self._step
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.num_computed_tokens = chunk.start + len(chunk.token_ids)
            sequence.num_scored = max(sequence.num_scored, chunk.scored.stop)
            sequence.num_unread += chunk.num_sampled
            sequence.last_sampled = self._step
            sequence.is_decoding = chunk.num_sampled > 0
            self._pages.publish(sequence)
            if chunk.num_sampled:
                self._let_follow(sequence)

    def _choose_ready(self) -> list[SequenceState]:
        """Sequences that decode in this step, oldest first.

        With S pipeline stages a sequence can decode in every S-th step only, so a step takes 1/S of the ready ones:
        those sampled longest ago.
        """
        ready = [
            sequence
            for sequence in self._running
            if sequence.is_ready and not sequence.is_parked and sequence.num_tokens < sequence.max_total_len
        ]
        through = [
            sequence
            for sequence in ready
            if sequence.last_sampled + self._num_stages <= self._step
            and not (sequence.num_unread and self._has_to_be_read(sequence))
        ]
        through.sort(key=lambda sequence: (sequence.last_sampled, sequence.order))
        due = through[: -(-len(ready) // self._num_stages)]
        # Every host-fed sequence may take a chunk. Those beyond the step's chunks are left out; as the ones sampled
        # longest ago, they come first in the next step.
        host_fed = [sequence for sequence in due if sequence.is_host_fed][self._max_ready_chunks :]
        if host_fed:
            due = [sequence for sequence in due if sequence not in host_fed]
        return sorted(due, key=lambda sequence: sequence.order)

    def _has_to_be_read(self, sequence: SequenceState) -> bool:
        """Whether the host has to read a sequence's last token before it can schedule the sequence again.

        A constrained sequence needs a mask that follows from that token, but only when the step is sampled. In a
        pipeline that is some launches after the step has entered, and by then the token has been read.
        """
        return sequence.is_host_fed or (sequence.constraint is not None and self._num_stages == 1)

    def _add_ready(self, step: _Step, sequence: SequenceState) -> None:
        """Adds a ready sequence: a decode row, or a chunk if it has drafts or the device lacks its last token."""
        drafts = self._drafts(step, sequence) if sequence.is_host_fed else ()
        start, num_pages = sequence.num_computed_tokens, len(sequence.pages)
        if sequence.is_decoding and not drafts:
            if self._grow(sequence, start + 1):
                new_page = (num_pages, sequence.pages[-1]) if len(sequence.pages) > num_pages else None
                step.decodes.append(DecodeRow(sequence, sequence.slot, new_page))
            return
        token_ids = [sequence.token_ids[-1], *drafts]
        if step.num_rows and self._grow(sequence, start + len(token_ids)):
            pages = tuple(sequence.pages)
            chunk = PrefillChunk(sequence, sequence.slot, start, token_ids, pages, num_sampled=len(token_ids))
            step.add(chunk, cost=len(drafts))

    def _drafts(self, step: _Step, sequence: SequenceState) -> Sequence[int]:
        """Drafts for the step to verify, as many as sequence limit, budget, one prefill row and free pages allow."""
        if self._plan_drafts is None:
            return ()
        most = min(sequence.max_total_len - 1, self._pages.most_tokens(sequence)) - len(sequence.token_ids)
        return self._plan_drafts(sequence, max(min(most, step.budget, PREFILL_BLOCK - 1), 0))

    def _grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Allocates the pages for a length, preempting the newest running sequences while too few are available.

        Returns:
          False if the sequence was itself the newest and has been preempted.
        """
        missing = self._pages.num_missing(sequence, num_tokens)
        while missing > self.pages.num_available:
            newest = max(self._running, key=lambda running: running.order)
            self._preempt(newest)
            if newest is sequence:
                return False
        if missing:
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
        self._preempt(max(parked, key=lambda sequence: sequence.order))
        return True

    def _stop_running(self, sequence: SequenceState) -> None:
        self._pages.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.is_decoding = NO_SLOT, False
        self._running.remove(sequence)

    def _admit(self, step: _Step) -> None:
        """Admits waiting sequences; a few younger ones may overtake one that does not fit yet."""
        skipped: list[SequenceState] = []
        aside: list[SequenceState] = []
        while self._waiting and self._free_slots and step.room:
            if len(skipped) > SKIP_WINDOW or (skipped and skipped[0].num_skipped >= MAX_SKIPS):
                break
            sequence = self._waiting.pop()
            if sequence.num_unread or sequence.is_parked:
                aside.append(sequence)
            elif not self._add_waiting(step, sequence):
                skipped.append(sequence)
            elif skipped:
                skipped[0].num_skipped += 1
        for sequence in (*skipped, *aside):
            self._waiting.push(sequence)

    def _share_of_prefill(self) -> int:
        """How many rows of prompts this step may prefill: without pipeline or chunked prefill, as many as it can have.

        In a pipeline, the prompts are spread over as many steps as there are stages, so that every stage has work. The
        share does not shrink until all prompts are computed: a share of what is left would end in many small steps.
        """
        if self._num_stages == 1 or not self._config.enable_chunked_prefill:
            return self._shapes.max_prefill
        left = [sequence for sequence in self._running if not (sequence.is_ready or sequence.is_parked)]
        left += self._waiting.first(len(self._free_slots))
        rows = sum(num_blocks(len(sequence.token_ids) - sequence.num_computed_tokens) for sequence in left)
        self._prefill_share = max(self._prefill_share, -(-rows // self._num_stages)) if rows else 0
        return min(self._prefill_share, self._shapes.max_prefill)

    def _add_waiting(self, step: _Step, sequence: SequenceState) -> bool:
        """Admits a waiting sequence if its pages and its first chunk fit."""
        prefix = self._pages.find_prefix(sequence)
        # One page is left for every running sequence to grow into; else what is admitted now is soon preempted.
        if self._pages.num_taken(sequence, prefix) > self.pages.num_available - len(self._running):
            return False
        if not self._chunk_len(step, len(sequence.token_ids) - prefix.num_tokens):
            return False
        step.page_copies += self._pages.take(sequence, prefix)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = len(prefix.pages) * self._config.page_size
            if sequence.prefix_source is None:
                self.prefix_cache_queries += len(sequence.token_ids)
                self.prefix_cache_hits += sequence.num_cached_tokens
        sequence.slot, sequence.prefix_source = self._free_slots.pop(), None
        sequence.num_skipped = 0
        self._running.append(sequence)
        self._add_chunk(step, sequence)
        return True

    def _chunk_len(self, step: _Step, remaining: int) -> int:
        """Tokens of the next chunk if `remaining` are to be computed; 0 if none fits."""
        length = min(remaining, step.room)
        return length if length == remaining or self._config.enable_chunked_prefill else 0

    def _add_chunk(self, step: _Step, sequence: SequenceState) -> None:
        """Adds a chunk with as many of a sequence's tokens that are not yet computed as fit."""
        start, num_known = sequence.num_computed_tokens, len(sequence.token_ids)
        length = self._chunk_len(step, num_known - start)
        if not length:
            return
        end = start + length
        chunk = PrefillChunk(
            sequence,
            sequence.slot,
            start,
            sequence.token_ids[start:end],
            tuple(sequence.pages),
            num_sampled=int(end == num_known),
            scored=_scored(sequence, start, end),
        )
        step.add(chunk, cost=length)


def _scored(sequence: SequenceState, start: int, end: int) -> range:
    """The positions of a chunk that are followed by a prompt token without a log-probability yet."""
    if sequence.request.prompt_logprobs is None:
        return range(0)
    first = max(start, sequence.num_scored)
    return range(first, max(first, min(end, len(sequence.request.prompt_token_ids) - 1)))
