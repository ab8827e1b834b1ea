"""The protocol between the engine and what computes its steps.

Owns: the abstract class. Counterpart of Megatron's AbstractModelInferenceWrapper.
Does not know: jax, models; a wrapper for tests can be a few lines of numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from jaxinfer.config.attention_span import WHOLE_TEXT, AttentionSpan
from jaxinfer.interventions import HookKind
from jaxinfer.sites import Site, Sites
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes

NO_SITES = "captures, interventions and functions of logits need a model that is held by one process alone"


class AbstractModelInferenceWrapper(ABC):
    """Computes steps in the order in which they are launched.

    A wrapper keeps state between steps. For each slot: last token, length, page table and sampling numbers; for each
    page: keys and values. A launch may return before its step is computed; collecting the step waits for that.

    A step leaves the pipeline with the num_stages-th launch, its own included: with one stage by its own launch, with
    two by the next one. Only then can it be collected, and only a later step can decode the tokens that it samples.
    Steps without work (StepBatch.idle) can be launched to move a pipeline on.
    """

    @property
    @abstractmethod
    def shapes(self) -> StepShapes:
        """The shapes of the steps that this wrapper runs."""

    @property
    @abstractmethod
    def num_pages(self) -> int:
        """KV pages, without the dump page; valid page ids are 1 .. num_pages."""

    @property
    @abstractmethod
    def row_usage(self) -> RowUsage:
        """Rows of all steps launched so far, with and without padding."""

    @property
    @abstractmethod
    def num_compilations(self) -> int:
        """Programs compiled so far."""

    @property
    def span(self) -> AttentionSpan:
        """What the tokens of a text see of it in at least one layer; other pages than these are never read."""
        return WHOLE_TEXT

    def foresee(self, coming_shapes: Callable[[], Sequence[StepShape]]) -> None:
        """Names a function that tells the shapes of the next steps, as far as they can be foreseen.

        The wrapper may call it during a launch, so that programs for these steps are compiled before they are needed.
        """

    @property
    def is_compiling(self) -> bool:
        """Whether a program is being compiled now, for which a step may have to wait."""
        return False

    @property
    def sites(self) -> Sites:
        """The sites at which StepBatch.taps can capture and change values.

        Raises:
          ValueError: the wrapper has none, as in a run of several processes.
        """
        raise ValueError(NO_SITES)

    def check_captures(self, sites: Sequence[Site]) -> None:
        """Refuses captures that could take too much memory on the devices.

        Raises:
          ValueError: the values of one step exceed the limit, or the wrapper has no sites.
        """
        raise ValueError(NO_SITES)

    def check_hooks(self, kinds: Collection[HookKind]) -> None:
        """Refuses the hooks of a request if they cannot be part of a step.

        Raises:
          ValueError: one cannot be traced, gives another shape, or they take too much memory; or there are no sites.
        """
        raise ValueError(NO_SITES)

    def head_logits(self, hidden: Float[np.ndarray, "M D"]) -> Float32[np.ndarray, "M V"]:
        """The logits of values that were captured at "final_norm"; waits for the device."""
        raise ValueError(NO_SITES)

    def chain_len(self, batch: StepBatch) -> int:
        """How many decode steps can be launched together if this is the first of them; 1 for this one alone."""
        return 1

    @abstractmethod
    def launch(self, batch: StepBatch) -> Any:
        """Starts a step, moves those in flight on by one stage, and returns the new step's handle."""

    def launch_chain(self, batches: Sequence[StepBatch]) -> list[Any]:
        """Starts as many steps as chain_len of the first one said, and returns their handles.

        Args:
          batches: decode steps, each of which continues the one before; the first one has rows for every slot that
            another one names.
        """
        return [self.launch(batch) for batch in batches]

    @abstractmethod
    def collect(self, handle: Any) -> StepResult:
        """Waits for a step that has left the pipeline and returns its results, without tokens if it samples none.

        Handles must be collected in the order of their launches; those of steps that sample nothing may be skipped.
        """

    @abstractmethod
    def warmup(self, *, background: bool = False) -> None:
        """Compiles the programs that serving needs, so that requests do not wait for compilations.

        Args:
          background: whether to return as soon as every step can run, and to compile the rest in the background.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees device memory; the wrapper cannot be used afterwards."""
