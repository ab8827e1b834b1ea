"""The queue of sequences that wait for a slot, in the order in which they are to run.

Owns: the order, the cheap removal of a sequence from the middle, and who waits for whose prompt.
Does not know: pages, which sequence may overtake others. Never imports jax.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from jaxinfer.engine.sequence import SequenceState

_FEW = 8
"""So many stale entries may always stay in the heap."""


class WaitingQueue:
    """A priority queue of sequences by their order, which is unique, and the followers that have yet to join it.

    A follower is a sequence whose prefix source is still computing the prompt that both have. It joins the queue when
    that is done, so that it can share the pages.

    The heap holds only the orders. A sequence removed from the middle is freed at once; its order stays in the heap as
    a stale entry, which pop skips. Once stale entries outnumber the others the heap is rebuilt, so that a removal costs
    little on average.
    """

    def __init__(self) -> None:
        self._orders: list[tuple[int, ...]] = []  # heap
        self._sequences: dict[tuple[int, ...], SequenceState] = {}
        self._followers: dict[SequenceState, dict[SequenceState, None]] = {}  # by prefix source, oldest first
        self.num_followers = 0
        """Sequences that wait for their prefix source's prompt; they are not counted by len."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._sequences.values())

    def __contains__(self, sequence: SequenceState) -> bool:
        return self._sequences.get(sequence.order) is sequence

    def push(self, sequence: SequenceState) -> None:
        """Adds a sequence at the place that its order gives it."""
        self._sequences[sequence.order] = sequence
        heapq.heappush(self._orders, sequence.order)

    def pop(self) -> SequenceState:
        """Removes and returns the sequence with the smallest order.

        Raises:
          IndexError: no sequence waits.
        """
        while (sequence := self._sequences.pop(heapq.heappop(self._orders), None)) is None:
            pass
        return sequence

    def follow(self, sequence: SequenceState, prefix_source: SequenceState) -> None:
        """Adds a sequence as a follower."""
        self._followers.setdefault(prefix_source, {})[sequence] = None
        self.num_followers += 1

    def let_follow(self, prefix_source: SequenceState) -> None:
        """Queues the followers of a sequence, whose prompt is computed now or never will be."""
        followers = self._followers.pop(prefix_source, ())
        self.num_followers -= len(followers)
        for follower in followers:
            self.push(follower)

    def remove(self, sequence: SequenceState) -> None:
        """Removes a waiting sequence, wherever it stands, or a follower."""
        if sequence not in self:
            if sequence.prefix_source is not None:
                del self._followers[sequence.prefix_source][sequence]
                self.num_followers -= 1
            return
        del self._sequences[sequence.order]
        if len(self._orders) > 2 * len(self._sequences) + _FEW:
            self._orders = list(self._sequences)
            heapq.heapify(self._orders)

    def first(self, count: int) -> list[SequenceState]:
        """The first `count` sequences, or all if there are fewer, without removing them; the rest is not looked at."""
        found: dict[SequenceState, None] = {}
        nearest = [(order, 0) for order in self._orders[:1]]  # heap of entries whose parents in the heap have been seen
        while nearest and len(found) < count:
            order, place = heapq.heappop(nearest)
            if order in self._sequences:
                found[self._sequences[order]] = None
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(self._orders):
                    heapq.heappush(nearest, (self._orders[child], child))
        return list(found)
