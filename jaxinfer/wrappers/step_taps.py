"""What a step captures and changes at the sites of its model, as the engine tells it a wrapper.

Owns: the captures and hooks of a step, and the captured values that come back.
Does not know: jax, sequences, how sites are laid out on a mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int32

from jaxinfer.interventions import Hook, HookKind


@dataclass(frozen=True, kw_only=True)
class StepTaps:
    """The captures and hooks of a step.

    Args:
      captured: names of the sites whose values are wanted.
      kinds: the hooks that some row of the step needs, in the order in which they are called at each site.
      decode_rows: int32[J, R], for each of J = len(kinds) and each decode row the row of its request's parameters; 0
        for a row without such a hook.
      prefill_rows: int32[J, P], the same for prefill rows.
      logit_kinds: the processors of logits and samplers that some row needs, in the order in which they are called.
      logit_rows: int32[I, M], for each of these and each logit row the row of its request's parameters, or 0.
      placed: the parameters that have to be on the device before the step, each with its row.
      live: all kinds of which parameters have been placed that a later step may need.
    """

    captured: frozenset[str]
    kinds: tuple[HookKind, ...]
    decode_rows: Int32[np.ndarray, "J R"]
    prefill_rows: Int32[np.ndarray, "J P"]
    logit_kinds: tuple[HookKind, ...]
    logit_rows: Int32[np.ndarray, "I M"]
    placed: tuple[tuple[int, Hook], ...] = ()
    live: frozenset[HookKind] = frozenset()


@dataclass(frozen=True, kw_only=True)
class StepCaptures:
    """What a step's taps have found.

    Args:
      decode: by site, float[R, ...], the values of the decode rows.
      prefill: by site, float[P, Q, ...], those of the tokens of each prefill row.
      failed_decode, failed_prefill: int32[R] and int32[P, Q], 1 + the index in StepTaps.kinds of the first hook that
        gave a token a value which is not finite, 1 + len(kinds) where no hook did but the residual stream is not finite
        behind a stage's layers; 0 for none.
      failed_logits: int32[M], 1 + the index in StepTaps.logit_kinds of the first function whose result for a logit row
        is not usable; 0 for none.
    """

    decode: Mapping[str, Float[np.ndarray, "R ..."]] = field(default_factory=dict)
    prefill: Mapping[str, Float[np.ndarray, "P Q ..."]] = field(default_factory=dict)
    failed_decode: Int32[np.ndarray, " R"]
    failed_prefill: Int32[np.ndarray, "P Q"]
    failed_logits: Int32[np.ndarray, " M"]
