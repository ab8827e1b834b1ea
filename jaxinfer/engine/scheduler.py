"""What runs in the next step.

Owns: the queues, the token budget, chunked prefill, admission with bounded skip-ahead, preemption by recomputation,
and the life of a sequence (tokens, slot, pages).
Does not know: devices, arrays, text. Never imports jax.

A pipeline of S stages gives a token S steps after it was asked for: a sequence decodes in every S-th step, and the
sequences spread over the steps. With one stage each rule below says "all".

The device runs behind the host: a sequence may have sampled tokens that the host has not read yet (num_unread). A
running sequence can be scheduled on, since its next input is already on the device; a preempted one has to wait until
all its tokens are known.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jaxinfer.config import EngineConfig
from jaxinfer.engine.page_allocator import PageAllocator, next_page_hash
from jaxinfer.request import FinishReason, Request
from jaxinfer.wrappers.step_batch import MAX_CHUNKS, PREFILL_BLOCK, StepShapes, num_blocks, pages_for

MAX_SKIPS = 16
"""How often younger requests may overtake the oldest waiting one that does not fit yet."""
SKIP_WINDOW = 8
"""How many waiting requests are looked at behind one that does not fit."""
NO_SLOT = -1


@dataclass(eq=False, slots=True)
class SequenceState:
    """One request's tokens and what it holds.

    Args:
      request: what was asked.
      order: (priority, arrival); smaller runs first and is preempted last.
      token_ids: prompt and the tokens read so far.
      num_computed: positions whose keys have been launched.
      is_decoding: all keys but the last token's are launched, and the device has that token.
      num_unread: tokens sampled on the device but not yet read.
      last_sampled: the scheduler's step that last sampled a token of it.
      slot: decode slot while running, else NO_SLOT.
      pages: KV pages in order while running.
      page_hashes: chain over its full pages, as far as computed.
      num_published: leading pages that were offered to the prefix cache.
      num_cached_tokens: prompt tokens found in the prefix cache at first admission; None before.
      num_skipped: how often younger requests overtook it while waiting.
      finish_reason: set when it ended.
    """

    request: Request
    order: tuple[int, int]
    token_ids: list[int]
    num_computed: int = 0
    is_decoding: bool = False
    num_unread: int = 0
    last_sampled: int = 0
    slot: int = NO_SLOT
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached_tokens: int | None = None
    num_skipped: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens it has, unread ones included."""
        return len(self.token_ids) + self.num_unread


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token of a decoding sequence.

    Args:
      sequence: whose.
      slot: its slot at the time.
      new_page: (index in its page table, page) that the token needs, or None.
    """

    sequence: SequenceState
    slot: int
    new_page: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive known tokens of a sequence.

    Args:
      sequence: whose.
      slot: its slot at the time.
      start: position of the first token.
      token_ids: the tokens.
      pages: all pages of the sequence.
      is_last: the next token is sampled after it.
    """

    sequence: SequenceState
    slot: int
    start: int
    token_ids: Sequence[int]
    pages: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
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

    def sampling_rows(self) -> Iterator[SequenceState]:
        """The sequences that sample a token, in the order of the step's logit rows."""
        yield from (row.sequence for row in self.decodes)
        yield from (chunk.sequence for chunk in self.prefills if chunk.is_last)


class Scheduler:
    """First come, first served within a priority.

    Args:
      config: the engine's settings.
      shapes: of the steps; they bound how many chunks fit into one.
      num_pages: of the KV pool, the dump page excluded.
      max_model_len: tokens of prompt and output together.
    """

    def __init__(self, config: EngineConfig, *, shapes: StepShapes, num_pages: int, max_model_len: int):
        self._config = config
        self._shapes = shapes
        self._max_model_len = max_model_len
        self.pages = PageAllocator(num_pages)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._running: list[SequenceState] = []
        self._waiting: list[tuple[tuple[int, int], SequenceState]] = []  # heap by order
        self._num_arrivals = 0
        self._num_stages = shapes.num_stages
        self._step = 0
        self._prefill_share = 0
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    def check_fits(self, request: Request) -> None:
        """Refuses a request that could never run.

        Raises:
          ValueError: the prompt leaves no room for a token, or the request needs more pages than there are.
        """
        num_prompt = len(request.prompt_token_ids)
        if num_prompt >= self._max_model_len:
            raise ValueError(
                f"prompt has {num_prompt} tokens, the limit is {self._max_model_len - 1} (max_model_len "
                f"{self._max_model_len} less one for the output); shorten it, set truncate_prompt_tokens or raise "
                f"max_model_len"
            )
        needed = pages_for(self._limit(request), self._config.page_size)
        if needed > self.pages.num_pages:
            raise ValueError(
                f"request needs {needed} KV pages for {self._limit(request)} tokens, the pool has "
                f"{self.pages.num_pages}; lower max_tokens or raise num_kv_pages"
            )

    def add(self, request: Request) -> SequenceState:
        """Queues a request.

        Raises:
          ValueError: it could never run.
        """
        self.check_fits(request)
        sequence = SequenceState(
            request=request, order=(request.priority, self._num_arrivals), token_ids=list(request.prompt_token_ids)
        )
        self._num_arrivals += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))
        return sequence

    def schedule(self) -> Schedule:
        """Chooses the next step's rows and takes their pages: decodes first, then prompts, oldest first."""
        self._step += 1
        decodes = self._schedule_decodes()
        prefills = self._schedule_prefills(self._config.max_num_batched_tokens - len(decodes))
        return Schedule(decodes=tuple(decodes), prefills=tuple(prefills))

    def append(self, sequence: SequenceState, token_id: int) -> None:
        """Records a token that the host has read and decides whether it was the last."""
        sequence.num_unread -= 1
        sequence.token_ids.append(token_id)
        if token_id in sequence.request.stop_token_ids:
            self.finish(sequence, "stop")
        elif len(sequence.token_ids) >= self._limit(sequence.request):
            self.finish(sequence, "length")
        elif sequence.slot != NO_SLOT:
            self._publish(sequence)

    def finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        """Ends a sequence, running or waiting, and gives back what it holds; its unread tokens will be dropped."""
        sequence.finish_reason = reason
        if sequence.slot != NO_SLOT:
            self._publish(sequence)
            self._release(sequence)
            self._running.remove(sequence)
        else:
            self._waiting.remove((sequence.order, sequence))
            heapq.heapify(self._waiting)

    def _limit(self, request: Request) -> int:
        return min(len(request.prompt_token_ids) + request.max_tokens, self._max_model_len)

    def _schedule_decodes(self) -> list[DecodeRow]:
        rows: list[DecodeRow] = []
        for sequence in self._due():
            if sequence.slot == NO_SLOT:  # preempted by an older one in this very pass
                continue
            index = sequence.num_computed // self._config.page_size
            new_page = None
            if index == len(sequence.pages):
                if not self._make_room(sequence):
                    continue
                new_page = (index, self.pages.allocate(1)[0])
                sequence.pages.append(new_page[1])
            rows.append(DecodeRow(sequence, sequence.slot, new_page))
        for row in rows:
            row.sequence.num_computed += 1
            row.sequence.num_unread += 1
            row.sequence.last_sampled = self._step
        return rows

    def _due(self) -> list[SequenceState]:
        """The sequences to decode now, oldest first: this step's share of all, those that wait the longest."""
        decoding = [
            sequence
            for sequence in self._running
            if sequence.is_decoding and sequence.num_tokens < self._limit(sequence.request)
        ]
        through = [entry for entry in decoding if entry.last_sampled + self._num_stages <= self._step]
        through.sort(key=lambda sequence: (sequence.last_sampled, sequence.order))
        share = -(-len(decoding) // self._num_stages)
        return sorted(through[:share], key=lambda sequence: sequence.order)

    def _make_room(self, sequence: SequenceState) -> bool:
        """Frees one page by preempting the newest running sequences, the asking one last; False if it had to go."""
        while not self.pages.num_available:
            newest = max(self._running, key=lambda running: running.order)
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.num_preemptions += 1
        self._publish(sequence)
        self._release(sequence)
        self._running.remove(sequence)
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _release(self, sequence: SequenceState) -> None:
        self.pages.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.pages, sequence.is_decoding = NO_SLOT, [], False
        sequence.num_computed = sequence.num_published = 0

    def _schedule_prefills(self, budget: int) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        self._prefill_share = self._share_of_prefill()
        for sequence in sorted(self._running, key=lambda sequence: sequence.order):
            if not sequence.is_decoding:
                budget -= self._add_chunk(chunks, sequence, budget)
        skipped: list[SequenceState] = []
        while self._waiting and self._free_slots and budget > 0:
            if len(skipped) > SKIP_WINDOW or (skipped and skipped[0].num_skipped >= MAX_SKIPS):
                break
            sequence = heapq.heappop(self._waiting)[1]
            num_tokens = self._add_waiting(chunks, sequence, budget)
            budget -= num_tokens
            if not num_tokens:
                skipped.append(sequence)
            elif skipped:
                skipped[0].num_skipped += 1
        for sequence in skipped:
            heapq.heappush(self._waiting, (sequence.order, sequence))
        for chunk in chunks:
            chunk.sequence.num_computed += len(chunk.token_ids)
            chunk.sequence.num_unread += chunk.is_last
            chunk.sequence.last_sampled = self._step
            chunk.sequence.is_decoding = chunk.is_last
            self._publish(chunk.sequence)
        return chunks

    def _share_of_prefill(self) -> int:
        """Prefill rows of this step: prompts spread over as many steps as there are stages, which then all have work.

        The share stays until nothing is left to prefill: shrinking with what is left, it would take many small steps.
        """
        if self._num_stages == 1 or not self._config.enable_chunked_prefill:
            return self._shapes.max_prefill
        left = [sequence for sequence in self._running if not sequence.is_decoding]
        left += [entry for _, entry in heapq.nsmallest(len(self._free_slots), self._waiting, key=lambda pair: pair[0])]
        rows = sum(num_blocks(len(sequence.token_ids) - sequence.num_computed) for sequence in left)
        share = max(self._prefill_share, -(-rows // self._num_stages)) if rows else 0
        return min(share, self._shapes.max_prefill)

    def _add_waiting(self, chunks: list[PrefillChunk], sequence: SequenceState, budget: int) -> int:
        """Admits a waiting sequence if its pages and its first chunk fit; returns the chunk's tokens, 0 if not."""
        if sequence.num_unread:
            return 0
        found = self._find_cached(sequence)
        num_new = pages_for(len(sequence.token_ids), self._config.page_size) - len(found)
        # Every running sequence keeps a page to grow into; without it, admission and preemption would alternate.
        room = self.pages.num_available - len(self._running)
        if num_new + self.pages.num_idle(found) > room:
            return 0
        start = len(found) * self._config.page_size
        if not self._chunk_len(chunks, len(sequence.token_ids) - start, budget):
            return 0
        self.pages.share(found)
        sequence.pages = found + self.pages.allocate(num_new)
        sequence.slot = self._free_slots.pop()
        sequence.num_computed = start
        sequence.num_published = len(found)
        sequence.num_skipped = 0
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = start
            self.prefix_cache_queries += len(sequence.token_ids)
            self.prefix_cache_hits += start
        self._running.append(sequence)
        return self._add_chunk(chunks, sequence, budget)

    def _find_cached(self, sequence: SequenceState) -> list[int]:
        """Cached pages of the sequence's beginning; its last token is always computed."""
        if not self._config.enable_prefix_caching:
            return []
        page_size = self._config.page_size
        self._extend_hashes(sequence, len(sequence.token_ids) // page_size)
        return self.pages.find(sequence.page_hashes[: (len(sequence.token_ids) - 1) // page_size])

    def _chunk_len(self, chunks: list[PrefillChunk], remaining: int, budget: int) -> int:
        """Tokens of a further chunk beside the ones chosen; 0 if none fits."""
        if len(chunks) == MAX_CHUNKS:
            return 0
        rows = self._prefill_share - sum(num_blocks(len(chunk.token_ids)) for chunk in chunks)
        length = min(remaining, budget, rows * PREFILL_BLOCK)
        return length if length == remaining or self._config.enable_chunked_prefill else 0

    def _add_chunk(self, chunks: list[PrefillChunk], sequence: SequenceState, budget: int) -> int:
        start = sequence.num_computed
        length = self._chunk_len(chunks, len(sequence.token_ids) - start, budget)
        if length:
            end = start + length
            chunks.append(
                PrefillChunk(
                    sequence,
                    sequence.slot,
                    start,
                    sequence.token_ids[start:end],
                    tuple(sequence.pages),
                    end == len(sequence.token_ids),
                )
            )
        return length

    def _extend_hashes(self, sequence: SequenceState, num_pages: int) -> None:
        page_size = self._config.page_size
        while len(sequence.page_hashes) < num_pages:
            start = len(sequence.page_hashes) * page_size
            previous = sequence.page_hashes[-1] if sequence.page_hashes else b""
            sequence.page_hashes.append(next_page_hash(previous, sequence.token_ids[start : start + page_size]))

    def _publish(self, sequence: SequenceState) -> None:
        """Offers the sequence's new full pages, launched and known, to the prefix cache.

        The device runs launches in order, so whoever finds a page reads it after it was written.
        """
        if not self._config.enable_prefix_caching:
            return
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self._config.page_size
        self._extend_hashes(sequence, num_full)
        while sequence.num_published < num_full:
            index = sequence.num_published
            parent = sequence.pages[index - 1] if index else 0
            self.pages.publish(sequence.pages[index], sequence.page_hashes[index], parent=parent)
            sequence.num_published += 1
