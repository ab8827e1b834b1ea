"""The host's side of the pipeline: which batches are on their way, and what shape a tick has to have.

Owns: the last batches launched, the shape that covers them, and the count of useful rows.
Does not know: devices; numpy only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxinfer.wrappers.step_batch import RowUsage, StepBatch, StepShape, StepShapes


@dataclass(eq=False, slots=True)
class StepHandle:
    """A launched step.

    Args:
      batch: its work.
      result: the device array that will hold its tokens; None until it has left the pipeline.
      scores: the one that will hold its targets' log-probabilities; None without any.
    """

    batch: StepBatch
    result: Any = None
    scores: Any = None


class InFlight:
    """The batches in the pipeline, one a stage.

    Args:
      shapes: of the steps.
    """

    def __init__(self, shapes: StepShapes):
        self._shapes = shapes
        self._handles: deque[StepHandle] = deque(maxlen=shapes.num_stages)  # newest first
        self._live_rows = self._launched_rows = 0

    @property
    def usage(self) -> RowUsage:
        """Rows so far, summed over stages and ticks."""
        return RowUsage(live=self._live_rows, launched=self._launched_rows)

    @property
    def leaving(self) -> StepHandle | None:
        """The step in the last stage; None while the pipeline fills for the first time."""
        return self._handles[-1] if len(self._handles) == self._shapes.num_stages else None

    def enter(self, handle: StepHandle) -> StepShape:
        """Moves all steps on by one stage and lets a new one in.

        Returns:
          The smallest shape that covers all steps now in flight.
        """
        self._handles.appendleft(handle)
        found = [handle.batch.shape for handle in self._handles]
        shape = self._shapes.shape(
            num_decode=max(shape.num_decode for shape in found),
            num_prefill=max(shape.num_prefill for shape in found),
            num_logits=max(shape.num_logits for shape in found),
            row_len=max(shape.row_len for shape in found),
            scored=any(shape.scored for shape in found),
        )
        self._live_rows += sum(handle.batch.num_live_rows for handle in self._handles)
        self._launched_rows += self._shapes.num_stages * (shape.num_decode + shape.num_prefill)
        return shape

    def page_copies(self) -> Int32[np.ndarray, "S J 2"] | None:
        """The page copies of the step in each stage, padded with the dump page onto itself."""
        largest = max(len(handle.batch.page_copies) for handle in self._handles)
        if not largest:
            return None
        size = next(size for size in copy_sizes(largest) if size >= largest)
        copies = np.zeros((self._shapes.num_stages, size, 2), np.int32)
        for stage, handle in enumerate(self._handles):
            copies[stage, : len(handle.batch.page_copies)] = handle.batch.page_copies
        return copies


def copy_sizes(limit: int) -> list[int]:
    """Numbers of page copies that there are programs for: powers of four, up to one that is at least a limit."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(4 * sizes[-1])
    return sizes
