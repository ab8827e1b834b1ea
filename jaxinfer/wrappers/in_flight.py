"""The host's view of the pipeline: which batches are in flight, and the shape of the next tick.

Owns: the last batches launched, the shape that covers them all, and the count of rows with and without padding.
Does not know: devices; it uses numpy only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import RowUsage
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes


@dataclass(eq=False, slots=True)
class StepHandle:
    """A launched step.

    Args:
      batch: the step's work.
      result: the device array that will hold the sampled tokens; None until the step has left the pipeline.
      place: the step's index in `result`, which holds the tokens of a whole chain; None outside of chains.
      scores: the device array that will hold the log-probabilities of batch.targets; None without targets.
      tapped: what the ticks that moved it have found at sites, one for each stage that it has passed; empty without
        taps.
      functions: the user's functions of logits in the program that has sampled it.
    """

    batch: StepBatch
    result: Any = None
    place: int | None = None
    scores: Any = None
    tapped: list[Any] = field(default_factory=list)
    functions: Sequence[Any] = ()


class InFlight:
    """The batches in the pipeline, one in each stage.

    Args:
      shapes: the shapes of steps.
    """

    def __init__(self, shapes: StepShapes):
        self._shapes = shapes
        self._handles: deque[StepHandle] = deque(maxlen=shapes.num_stages)  # newest first
        self._live_rows = self._launched_rows = 0

    @property
    def usage(self) -> RowUsage:
        """Rows with and without padding so far, summed over stages and ticks."""
        return RowUsage(live=self._live_rows, launched=self._launched_rows)

    @property
    def handles(self) -> tuple[StepHandle, ...]:
        """The steps in flight; the index of each is its stage."""
        return tuple(self._handles)

    @property
    def leaving(self) -> StepHandle | None:
        """The step in the last stage; None while the pipeline fills for the first time."""
        return self._handles[-1] if len(self._handles) == self._shapes.num_stages else None

    def enter(self, handle: StepHandle) -> StepShape:
        """Lets a new step into the first stage and moves the others on by one stage.

        Returns:
          The smallest shape that holds all steps now in flight.
        """
        self._handles.appendleft(handle)
        found = [handle.batch.shape for handle in self._handles]
        return self._shapes.shape(
            num_decode=max(shape.num_decode for shape in found),
            num_prefill=max(shape.num_prefill for shape in found),
            num_logits=max(shape.num_logits for shape in found),
            row_len=max(shape.row_len for shape in found),
            scored=any(shape.scored for shape in found),
        )

    def clear(self) -> None:
        """Forgets the steps in flight; the pipeline is empty again."""
        self._handles.clear()

    def count_rows(self, shape: StepShape) -> None:
        """Counts the rows of a tick that runs in this shape."""
        self._live_rows += sum(handle.batch.num_live_rows for handle in self._handles)
        self._launched_rows += self._shapes.num_stages * (shape.num_decode + shape.num_prefill)

    @property
    def num_page_copies(self) -> int:
        """The most page copies of a step in flight."""
        return max(len(handle.batch.page_copies) for handle in self._handles)

    def page_copies(self, size: int) -> Int32[np.ndarray, "S J 2"]:
        """The page copies of the step in each stage, J = size of each; padding copies the dump page to itself."""
        copies = np.zeros((self._shapes.num_stages, size, 2), np.int32)
        for stage, handle in enumerate(self._handles):
            copies[stage, : len(handle.batch.page_copies)] = handle.batch.page_copies
        return copies


def copy_sizes(limit: int) -> list[int]:
    """The numbers of page copies that programs exist for: powers of four, up to the first that is at least limit."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(4 * sizes[-1])
    return sizes
