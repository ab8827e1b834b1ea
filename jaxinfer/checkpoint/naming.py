"""Parameters of a model and the checkpoint tensors they are made of.

Owns: matching a model's parameter paths with checkpoint names, stage by stage.
Does not know: families (it gets their names as data), files, meshes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxinfer.layers.linear import Rows
from jaxinfer.models.registry import ModelFamily


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedParameter:
    """One parameter and the checkpoint tensors of each of its stages.

    Args:
      path: dotted path in the model.
      variable: the nnx variable, with shape, dtype and spec.
      stages: tensor names by stage, an empty tuple for a padding layer; one entry for a parameter without stages. A
        fused parameter has one name a part, or a single one for the tensor in which its parts follow each other.
      staged: the first axis is the stage.
      transposed: the tensors are stored [in, out].
    """

    path: str
    variable: nnx.Variable
    stages: tuple[tuple[str, ...], ...]
    staged: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one stage."""
        return self.variable.shape[1:] if self.staged else self.variable.shape

    @property
    def parts(self) -> tuple[Rows, ...]:
        """What each tensor contributes: a fused parameter declares its parts, a vocabulary its rows without padding."""
        return self.variable.get_metadata().get("parts", (Rows(*self.shape[:1]),))

    def num_interleaved(self, num_shards: int) -> int:
        """Shards that hold a part of every part; 1 where parts follow each other whole."""
        whole = len(self.parts) == 1 or self.variable.get_metadata().get("whole_parts", False)
        return 1 if whole else num_shards

    def part_source(self, stage: int, part: int) -> tuple[str, int]:
        """The tensor that holds a part of one stage, and the part's first row in it."""
        names = self.stages[stage]
        if len(names) == len(self.parts):
            return names[part], 0
        return names[0], sum(rows.stored for rows in self.parts[:part])

    def stored_shape(self, stage: int, number: int) -> tuple[int, ...]:
        """Of tensor `number` of one stage, as its file must have it."""
        rows = [part.stored for part in self.parts]
        shape = (rows[number] if len(self.stages[stage]) == len(rows) else sum(rows), *self.shape[1:])
        return shape[::-1] if self.transposed else shape


def name_parameters(
    state: nnx.State, family: ModelFamily, num_layers: int, *, base_prefix: str = ""
) -> dict[tuple[Any, ...], NamedParameter]:
    """Every parameter of a model with its checkpoint tensors.

    Args:
      state: of the model, abstract or not.
      family: whose names they are.
      num_layers: layers of the model; further ones are padding.
      base_prefix: taken off the front of the names.

    Returns:
      nnx path -> NamedParameter, in the model's order.
    """
    flat = dict(nnx.to_flat_state(state))
    return {
        path: _describe(".".join(map(str, path)), variable, family, num_layers, base_prefix)
        for path, variable in flat.items()
    }


def missing_prefix(family: ModelFamily, found: Iterable[str]) -> str:
    """The family's base_prefix if none of the tensors found has it, else nothing."""
    return "" if any(name.startswith(family.base_prefix) for name in found) else family.base_prefix


def _describe(
    path: str, variable: nnx.Variable, family: ModelFamily, num_layers: int, base_prefix: str
) -> NamedParameter:
    layer = re.search(r"\.(\d+)\.", path)
    key = path if layer is None else path.replace(layer.group(), ".{layer}.", 1)
    names = tuple(name.removeprefix(base_prefix) for name in family.tensor_names[key])
    if any("{expert}" in name for name in names):
        num_experts = len(variable.get_metadata()["parts"]) // len(names)
        names = tuple(name.replace("{expert}", str(expert)) for expert in range(num_experts) for name in names)
    transposed = key in family.transposed
    if layer is None:
        return NamedParameter(path=path, variable=variable, stages=(names,), staged=False, transposed=transposed)
    num_stages = variable.shape[0]
    layers_per_stage = -(-num_layers // num_stages)
    numbers = [stage * layers_per_stage + int(layer.group(1)) for stage in range(num_stages)]
    stages = tuple(
        tuple(name.format(layer=number) for name in names) if number < num_layers else () for number in numbers
    )
    return NamedParameter(path=path, variable=variable, stages=stages, staged=True, transposed=transposed)
