"""Turns a model's parameters back into checkpoint tensors: the inverse of the loader.

Owns: taking fused and stacked parameters apart into tensors with their checkpoint names.
Does not know: files, any single family (it gets the names as data).
"""

from __future__ import annotations

import numpy as np
from flax import nnx

from jaxinfer.checkpoint.fusion import unfuse
from jaxinfer.checkpoint.naming import NamedParameter, name_parameters, scale_path
from jaxinfer.layers.weight import dequantize
from jaxinfer.models.registry import ModelFamily


def export_parameters(
    state: nnx.State, *, family: ModelFamily, num_layers: int, num_shards: int = 1
) -> dict[str, np.ndarray]:
    """The checkpoint tensors of a model's parameters.

    Args:
      state: the model's state, with arrays.
      family: the names of its tensors, and how they are stored.
      num_layers: layers of the model; layers that only pad the stages are left out.
      num_shards: the number of tensor shards that the parameters were loaded for.

    Returns:
      Checkpoint name -> array in the parameter's dtype (the model's for int8 matrices, which are multiplied by their
      scales), without the padding of the vocabulary.
    """
    tensors: dict[str, np.ndarray] = {}
    variables = dict(nnx.to_flat_state(state))
    for path, parameter in name_parameters(state, family, num_layers).items():
        values = parameter.variable[...]
        if parameter.is_quantized:
            values = dequantize(values, variables[scale_path(path)][...], parameter.variable.float_dtype)
        values = np.asarray(values)
        values = values.swapaxes(-1, -2) if parameter.inputs_first else values
        for names, stage in zip(parameter.stages, values if parameter.staged else values[None], strict=True):
            if names:
                tensors |= zip(names, _stored(parameter, stage, len(names), num_shards), strict=True)
    return tensors


def _stored(parameter: NamedParameter, values: np.ndarray, num_tensors: int, num_shards: int) -> list[np.ndarray]:
    """The checkpoint tensors of one pipeline stage of a parameter."""
    parts = unfuse(values, parameter.parts, parameter.num_interleaved(num_shards))
    if num_tensors < len(parts):
        parts = [np.concatenate(parts)]
    return [np.ascontiguousarray(part.T) for part in parts] if parameter.transposed else parts
