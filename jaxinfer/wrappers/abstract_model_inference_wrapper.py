"""The protocol between the engine and whatever computes a step.

Owns: the contract. Counterpart of Megatron's AbstractModelInferenceWrapper.
Does not know: jax, models; a test wrapper can be a few lines of numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxinfer.wrappers.step_batch import AllowedTokens, RowUsage, StepBatch, StepResult, StepShapes


class AbstractModelInferenceWrapper(ABC):
    """Computes steps in the order in which they are launched.

    State that lives behind this protocol, by slot: last token, length, page table, sampling numbers; by page: keys and
    values. A launch may return before the step is done; collecting waits for it.

    A step is through once shapes.num_stages steps, itself included, have been launched: only then can it be collected,
    and only a later step can decode a token that it samples. Steps without work (StepBatch.idle) move a pipeline on.
    """

    @property
    @abstractmethod
    def shapes(self) -> StepShapes:
        """The shapes of steps this wrapper runs."""

    @property
    @abstractmethod
    def num_pages(self) -> int:
        """KV pages, without the dump page; valid page ids are 1 .. num_pages."""

    @property
    @abstractmethod
    def row_usage(self) -> RowUsage:
        """Rows of all steps launched so far."""

    @property
    @abstractmethod
    def num_compilations(self) -> int:
        """Programs compiled so far."""

    @abstractmethod
    def launch(self, batch: StepBatch, allowed: AllowedTokens | None = None) -> Any:
        """Starts a step, moves those in flight on, and returns its handle.

        Args:
          batch: the step that enters.
          allowed: for slots of the step that leaves the pipeline with this launch.
        """

    @abstractmethod
    def collect(self, handle: Any) -> StepResult:
        """Waits for a step that is through and returns its tokens, none if it samples none.

        Handles are collected in the order of their launches; those of steps that sample nothing may be left out.
        """

    @abstractmethod
    def warmup(self) -> None:
        """Compiles every program that serving can need."""

    @abstractmethod
    def close(self) -> None:
        """Frees device memory; the wrapper cannot be used afterwards."""
