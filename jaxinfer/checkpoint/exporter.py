"""A model's parameters as checkpoint tensors: the loader's inverse.

Owns: taking fused and stacked parameters apart under their checkpoint names.
Does not know: files, any family (its names are data).
"""

from __future__ import annotations

import numpy as np
from flax import nnx

from jaxinfer.checkpoint.fusion import unfuse
from jaxinfer.checkpoint.naming import NamedParameter, name_parameters
from jaxinfer.models.registry import ModelFamily


def export_parameters(
    state: nnx.State, *, family: ModelFamily, num_layers: int, num_shards: int = 1
) -> dict[str, np.ndarray]:
    """The checkpoint tensors of a model's parameters.

    Args:
      state: of the model, with arrays.
      family: the names of its tensors, and how they are stored.
      num_layers: layers of the model; padding layers are left out.
      num_shards: tensor shards that fused parameters were laid out for.

    Returns:
      Checkpoint name -> array of the parameter's dtype, with the padding of a vocabulary taken off.
    """
    tensors: dict[str, np.ndarray] = {}
    for parameter in name_parameters(state, family, num_layers).values():
        values = np.asarray(parameter.variable[...])
        for names, stage in zip(parameter.stages, values if parameter.staged else values[None], strict=True):
            if names:
                tensors |= zip(names, _stored(parameter, stage, len(names), num_shards), strict=True)
    return tensors


def _stored(parameter: NamedParameter, values: np.ndarray, num_tensors: int, num_shards: int) -> list[np.ndarray]:
    """The tensors of one stage of a parameter."""
    parts = unfuse(values, parameter.parts, parameter.num_interleaved(num_shards))
    if num_tensors < len(parts):
        parts = [np.concatenate(parts)]
    return [np.ascontiguousarray(part.T) for part in parts] if parameter.transposed else parts
