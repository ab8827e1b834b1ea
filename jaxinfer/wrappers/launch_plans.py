"""What one launch runs: compiled programs with the arrays that the host uploads for them.

A plan is made before anything is enqueued, since programs may have to be compiled for it.

Owns: the two parts of a plan.
Does not know: how programs are chosen, or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxinfer.wrappers.step_shapes import StepShape
from jaxinfer.wrappers.tapping import FunctionUpload, TapUpload


class Call(NamedTuple):
    """A compiled program and the array that the host uploads for it."""

    program: jax.stages.Compiled
    words: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """What a launch runs first: page copies, if there are any, then the forward program for all batches in flight.

    Args:
      shape: the shape of the forward program.
      copy, forward: programs of StepPrograms; copy is None if there is nothing to copy.
      taps: what the forward program takes for its taps; None for a plain one.
    """

    shape: StepShape
    copy: Call | None
    forward: Call
    taps: TapUpload | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """What a launch runs next, for the step that leaves the pipeline.

    Args:
      score: scores the tokens of its prompts; None if it has none to score.
      edits: upload logit edits and allowed tokens, in this order, before it is sampled.
      sample: the sampler; None if it samples nothing.
      functions: what the sampler takes for the user's functions of logits; None without any.
    """

    score: Call | None
    edits: Sequence[Call]
    sample: jax.stages.Compiled | None
    functions: FunctionUpload | None
