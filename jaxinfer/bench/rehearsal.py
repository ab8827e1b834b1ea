"""Finds out which programs a measurement will need, by running it on an engine without a model.

Owns: the model wrapper that computes nothing and records what it is asked for.
Does not know: what is measured.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShapes


class RecordingWrapper(AbstractModelInferenceWrapper):
    """A wrapper that answers every step with token 0 and records which programs a real wrapper would run.

    It serves for greedy requests of known lengths on one pipeline stage, for which the shapes of the steps do not
    depend on the tokens.

    Args:
      shapes: the step shapes of the real wrapper.
      num_pages: its KV pages.
    """

    def __init__(self, shapes: StepShapes, num_pages: int):
        self._shapes = shapes
        self._num_pages = num_pages
        self.programs: dict[tuple[Hashable, ...], None] = {}
        """The programs, as keys in the order of their first use."""

    @property
    def shapes(self) -> StepShapes:
        """The shapes of steps this wrapper runs."""
        return self._shapes

    @property
    def num_pages(self) -> int:
        """KV pages, without the dump page."""
        return self._num_pages

    @property
    def row_usage(self) -> RowUsage:
        """No rows are counted."""
        return RowUsage(live=0, launched=0)

    @property
    def num_compilations(self) -> int:
        """Different programs recorded so far."""
        return len(self.programs)

    def launch(self, batch: StepBatch) -> Any:
        """Records the step's programs and returns the batch, which serves as the handle."""
        self.programs["forward", batch.shape] = None
        if batch.has_logits:
            self.programs["sample", batch.shape.num_logits, batch.variant, None] = None
        return batch

    def collect(self, handle: Any) -> StepResult:
        """Token 0 for every row."""
        return StepResult(token_ids=np.zeros(handle.shape.num_logits if handle.has_logits else 0, np.int32))

    def warmup(self, *, background: bool = False) -> None:
        """Nothing to compile."""

    def close(self) -> None:
        """Nothing to free."""
