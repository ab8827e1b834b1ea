"""Finds out which programs a measurement will need, by running it on an engine without a model.

Owns: the model wrapper that computes nothing and records what it is asked for.
Does not know: what is measured.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from jaxinfer.bench.zero_wrapper import ZeroWrapper
from jaxinfer.wrappers.chains import ChainRule
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_shapes import StepShapes


class RecordingWrapper(ZeroWrapper):
    """A wrapper that answers every step with token 0 and records which programs a real wrapper would run.

    It serves for greedy requests of known lengths on one pipeline stage, for which the shapes of the steps do not
    depend on the tokens.

    Args:
      shapes: the step shapes of the real wrapper.
      num_pages: its KV pages.
      chains: its rule for steps that are launched together.
    """

    def __init__(self, shapes: StepShapes, num_pages: int, chains: ChainRule):
        super().__init__(shapes, num_pages, chains)
        self.programs: dict[tuple[Hashable, ...], None] = {}
        """The programs, as keys in the order of their first use."""

    @property
    def num_compilations(self) -> int:
        """Different programs recorded so far."""
        return len(self.programs)

    def launch(self, batch: StepBatch) -> Any:
        """Records the step's programs."""
        self.programs["forward", batch.shape] = None
        if batch.has_logits:
            self.programs["sample", batch.shape.num_logits, batch.variant, None] = None
        return super().launch(batch)

    def launch_chain(self, batches: Sequence[StepBatch]) -> list[Any]:
        """Records the program of the chain."""
        self.programs["chain", batches[0].shape, len(batches), batches[0].variant] = None
        return list(batches)
