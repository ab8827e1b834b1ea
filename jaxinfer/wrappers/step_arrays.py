"""The arrays that programs of a step take and return, as flat lists of leaves.

Owns: which arrays stay on the devices from step to step, and what passes from a step's first program to the next.
Does not know: what the programs compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax


@dataclass
class StepArrays:
    """The arrays that live on the device from step to step, as flat lists of leaves.

    They are flattened once, since flattening them again in every call would cost time.

    Args:
      leaves, head_leaves: parameters of the whole model, and those of the head.
      state, caches, ring: leaves of DecodeState, the KV caches and the pipeline's Ring; every step takes them by
        donation and returns the new ones.
      edits: leaves of EditState, donated in the same way to steps with edited rows; empty until the first such step.
    """

    leaves: list[jax.Array]
    head_leaves: list[jax.Array]
    state: list[jax.Array]
    caches: list[jax.Array]
    ring: list[jax.Array]
    edits: list[jax.Array] = field(default_factory=list)

    @property
    def all(self) -> list[jax.Array]:
        """Every array; those of the head appear twice, as they are among the model's leaves as well."""
        return [*self.leaves, *self.head_leaves, *self.state, *self.caches, *self.ring, *self.edits]


class HeadInputs(NamedTuple):
    """The leaves of a LeavingBatch: what the forward program returns for the programs of the head.

    Args:
      hidden: [M, D], hidden states to sample from.
      rows: the leaves of LogitRows.
      prompts: [T, D], hidden states of all prefill tokens; None unless the shape is a scored one.
    """

    hidden: Any
    rows: list[Any]
    prompts: Any = None


class TapResults(NamedTuple):
    """What the taps of a program have found; every array has a part of T tokens for each stage, one after the other.

    Args:
      captured: [S * T, ...] by site, with the numbers that layers have within their stage.
      failed: int32[S * T], as Taps.failed.
    """

    captured: dict[str, Any]
    failed: Any
