"""The queue of sequences that wait for a slot, in the order in which they are to run.

Owns: the order, and the cheap removal of a sequence from the middle.
Does not know: why a sequence waits, which may overtake others. Never imports jax.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from jaxinfer.engine.sequence import SequenceState

_FEW = 8
"""So many stale entries may always stay in the heap."""


class WaitingQueue:
    """A priority queue of sequences by their order, which is unique.

    The heap holds only the orders. A sequence removed from the middle is freed at once; its order stays in the heap as
    a stale entry, which pop skips. Once stale entries outnumber the others the heap is rebuilt, so that a removal costs
    little on average.
    """

    def __init__(self) -> None:
        self._orders: list[tuple[int, ...]] = []  # heap
        self._sequences: dict[tuple[int, ...], SequenceState] = {}

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

    def remove(self, sequence: SequenceState) -> None:
        """Removes a waiting sequence, wherever it stands."""
        del self._sequences[sequence.order]
        if len(self._orders) > 2 * len(self._sequences) + _FEW:
            self._orders = list(self._sequences)
            heapq.heapify(self._orders)

    def first(self, count: int) -> list[SequenceState]:
        """The first `count` sequences, or all if there are fewer, without removing them."""
        return [self._sequences[order] for order in heapq.nsmallest(count, self._sequences)]
