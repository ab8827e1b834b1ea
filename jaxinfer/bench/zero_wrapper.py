"""ZeroWrapper: a model's wrapper without a model, whose every token is 0.

Owns: what a wrapper has to have, so that an engine runs.
Does not know: why anybody runs an engine without a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.chains import NO_CHAINS, ChainRule
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShapes


class ZeroWrapper(AbstractModelInferenceWrapper):
    """A wrapper that computes nothing and answers every step with token 0; for engines with one pipeline stage.

    Args:
      shapes: the shapes of steps.
      num_pages: KV pages.
      chains: which steps are launched together.
    """

    def __init__(self, shapes: StepShapes, num_pages: int, chains: ChainRule = NO_CHAINS):
        self._shapes = shapes
        self._chains = chains
        self._num_pages = num_pages

    @property
    def shapes(self) -> StepShapes:
        """The shapes of steps this wrapper runs."""
        return self._shapes

    @property
    def num_pages(self) -> int:
        """KV pages, without the dump page."""
        return self._num_pages

    def chain_len(self, batch: StepBatch) -> int:
        """As the rule says."""
        return self._chains.chain_len(batch)

    @property
    def row_usage(self) -> RowUsage:
        """No rows are counted."""
        return RowUsage(live=0, launched=0)

    @property
    def num_compilations(self) -> int:
        """Nothing is compiled."""
        return 0

    def launch(self, batch: StepBatch) -> Any:
        """Returns the batch, which serves as the handle."""
        return batch

    def collect(self, handle: Any) -> StepResult:
        """Token 0 for every row."""
        return StepResult(token_ids=np.zeros(handle.shape.num_logits if handle.has_logits else 0, np.int32))

    def warmup(self, *, background: bool = False) -> None:
        """Nothing to compile."""

    def close(self) -> None:
        """Nothing to free."""
