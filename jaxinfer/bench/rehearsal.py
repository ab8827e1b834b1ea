"""Which programs a measurement will need, found by running it on an engine without a model.

Owns: the wrapper that computes nothing.
Does not know: what is measured.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.step_batch import AllowedTokens, RowUsage, StepBatch, StepResult, StepShapes


class RecordingWrapper(AbstractModelInferenceWrapper):
    """Answers every step with token 0 and keeps the names of the programs that a real wrapper would run.

    Good for greedy requests of known lengths on one pipeline stage: which shapes their steps have does not depend on
    the tokens.

    Args:
      shapes: of the wrapper it stands for.
      num_pages: of the same.
    """

    def __init__(self, shapes: StepShapes, num_pages: int):
        self._shapes = shapes
        self._num_pages = num_pages
        self.programs: dict[tuple[Hashable, ...], None] = {}
        """In the order of their first use, without repetition."""

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
        """None are counted."""
        return RowUsage(live=0, launched=0)

    @property
    def num_compilations(self) -> int:
        """Programs met so far."""
        return len(self.programs)

    def launch(self, batch: StepBatch, allowed: AllowedTokens | None = None) -> Any:
        """Keeps the programs' names; the batch is its own handle."""
        self.programs["forward", batch.shape] = None
        if batch.has_logits:
            self.programs["sample", batch.shape.num_logits, batch.variant, None] = None
        return batch

    def collect(self, handle: Any) -> StepResult:
        """Token 0 for every row."""
        return StepResult(token_ids=np.zeros(handle.shape.num_logits if handle.has_logits else 0, np.int32))

    def warmup(self) -> None:
        """Nothing to compile."""

    def close(self) -> None:
        """Nothing to free."""
