"""Parameters of a model and the checkpoint tensors they are made of.

Owns: matching a model's parameter paths with checkpoint names, stage by stage.
Does not know: families (it gets their names as data), files, meshes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedParameter:
    """One parameter and the checkpoint tensors of each of its stages.

    Args:
      path: dotted path in the model.
      variable: the nnx variable, with shape, dtype and spec.
      stages: tensor names by stage, an empty tuple for a padding layer; one entry for a parameter without stages.
      staged: the first axis is the stage.
    """

    path: str
    variable: nnx.Variable
    stages: tuple[tuple[str, ...], ...]
    staged: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one stage."""
        return self.variable.shape[1:] if self.staged else self.variable.shape

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each tensor: a fused parameter declares those of each part, a vocabulary its rows without padding."""
        return self.variable.get_metadata().get("rows", self.shape[:1])


def name_parameters(
    state: nnx.State, tensor_names: Mapping[str, tuple[str, ...]], num_layers: int
) -> dict[tuple[Any, ...], NamedParameter]:
    """Every parameter of a model with its checkpoint tensors.

    Args:
      state: of the model, abstract or not.
      tensor_names: parameter path -> checkpoint tensors; "{layer}" stands for the layer's number.
      num_layers: layers of the model; further ones are padding.

    Returns:
      nnx path -> NamedParameter, in the model's order.
    """
    flat = dict(nnx.to_flat_state(state))
    return {
        path: _describe(".".join(map(str, path)), variable, tensor_names, num_layers) for path, variable in flat.items()
    }


def _describe(
    path: str, variable: nnx.Variable, tensor_names: Mapping[str, tuple[str, ...]], num_layers: int
) -> NamedParameter:
    layer = re.search(r"\.(\d+)\.", path)
    if layer is None:
        return NamedParameter(path=path, variable=variable, stages=(tensor_names[path],), staged=False)
    names = tensor_names[path.replace(layer.group(), ".{layer}.", 1)]
    num_stages = variable.shape[0]
    layers_per_stage = -(-num_layers // num_stages)
    numbers = [stage * layers_per_stage + int(layer.group(1)) for stage in range(num_stages)]
    stages = tuple(
        tuple(name.format(layer=number) for name in names) if number < num_layers else () for number in numbers
    )
    return NamedParameter(path=path, variable=variable, stages=stages, staged=True)
