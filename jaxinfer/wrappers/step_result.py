"""What the engine gets back from a wrapper, as numpy arrays.

Owns: the results of a step and the count of its rows.
Does not know: jax, requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from jaxinfer.wrappers.step_taps import StepCaptures


@dataclass(frozen=True, kw_only=True, slots=True)
class RowUsage:
    """Rows of both segments, summed over pipeline stages and steps.

    Args:
      live: rows with work.
      launched: all rows of the programs that ran, padding included.
    """

    live: int
    launched: int


@dataclass(frozen=True, kw_only=True)
class LogprobArrays:
    """Raw log-probabilities (natural log, before edits and temperature) at M positions.

    Args:
      logprob, rank: float32[M], int32[M], of the sampled or scored token; rank 1 is the most likely.
      top_ids, top_logprobs: int32[M, K], float32[M, K], the K most likely tokens, best first.
    """

    logprob: Float32[np.ndarray, " M"]
    rank: Int32[np.ndarray, " M"]
    top_ids: Int32[np.ndarray, "M K"]
    top_logprobs: Float32[np.ndarray, "M K"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The results of a step.

    Args:
      token_ids: int32[M], the sampled tokens; empty if the step samples none.
      logprobs: log-probabilities at the M logit rows; None if the step did not ask for them.
      scores: log-probabilities of StepBatch.targets at the P * Q prefill tokens; None if the step has no targets.
      captures: what its taps have found; None if the step has no taps.
    """

    token_ids: Int32[np.ndarray, " M"]
    logprobs: LogprobArrays | None = None
    scores: LogprobArrays | None = None
    captures: StepCaptures | None = None
