"""A model's parameters as checkpoint tensors: the loader's inverse.

Owns: taking fused and stacked parameters apart under their checkpoint names.
Does not know: files, families.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flax import nnx

from jaxinfer.checkpoint.fusion import unfuse
from jaxinfer.checkpoint.naming import name_parameters


def export_parameters(
    state: nnx.State, *, tensor_names: Mapping[str, tuple[str, ...]], num_layers: int, num_shards: int = 1
) -> dict[str, np.ndarray]:
    """The checkpoint tensors of a model's parameters.

    Args:
      state: of the model, with arrays.
      tensor_names: parameter path -> checkpoint tensors; "{layer}" stands for the layer's number.
      num_layers: layers of the model; padding layers are left out.
      num_shards: tensor shards that fused parameters were laid out for.

    Returns:
      Checkpoint name -> array of the parameter's dtype, with the padding of a vocabulary taken off.
    """
    tensors: dict[str, np.ndarray] = {}
    for parameter in name_parameters(state, tensor_names, num_layers).values():
        values = np.asarray(parameter.variable[...])
        for names, stage in zip(parameter.stages, values if parameter.staged else values[None], strict=True):
            if len(names) > 1:
                tensors |= zip(names, unfuse(stage, parameter.part_rows, num_shards), strict=True)
            elif names:
                tensors[names[0]] = stage[: parameter.part_rows[0]]
    return tensors
