"""Sequences that wait for a slot, in the order in which they are to run.

Owns: the order, and taking a sequence out of the middle without looking at the others.
Does not know: why a sequence waits, who may overtake whom. Never imports jax.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from jaxinfer.engine.schedule import SequenceState

_FEW = 8
"""Orders without a sequence that are never worth tidying up."""


class WaitingQueue:
    """A priority queue of sequences by their order, which no two share.

    The heap holds orders alone. A sequence that is taken out is let go at once, with its tokens; only its order stays
    in the heap, to be skipped when its turn comes. Once such orders outnumber the others the heap is built anew, so
    that taking a sequence out costs little on average.
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
        """Puts a sequence where its order says."""
        self._sequences[sequence.order] = sequence
        heapq.heappush(self._orders, sequence.order)

    def pop(self) -> SequenceState:
        """Takes out the sequence with the smallest order.

        Raises:
          IndexError: none waits.
        """
        while (sequence := self._sequences.pop(heapq.heappop(self._orders), None)) is None:
            pass
        return sequence

    def remove(self, sequence: SequenceState) -> None:
        """Takes out a sequence that waits, wherever it stands."""
        del self._sequences[sequence.order]
        if len(self._orders) > 2 * len(self._sequences) + _FEW:
            self._orders = list(self._sequences)
            heapq.heapify(self._orders)

    def first(self, count: int) -> list[SequenceState]:
        """The sequences with the smallest orders, so many or all, without taking them out."""
        return [self._sequences[order] for order in heapq.nsmallest(count, self._sequences)]
