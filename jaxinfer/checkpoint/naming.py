"""Which checkpoint tensors each parameter of a model is made of.

Owns: matching a model's parameter paths with checkpoint names, for every pipeline stage.
Does not know: any single family (it gets the names as data), files, meshes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from jaxinfer.layers.linear import FusedPart
from jaxinfer.layers.weight import SCALE
from jaxinfer.models.registry import ModelFamily


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedParameter:
    """One parameter and the checkpoint tensors of each of its stages.

    Args:
      path: dotted path in the model, such as "layers.0.mlp.down.weight".
      variable: the nnx variable, with shape, dtype and spec.
      stages: for each pipeline stage, the names of its tensors: one name, or for a fused parameter one per part or a
        single tensor that holds all parts one after the other. A layer that only pads a stage has no names. A
        parameter without stages (such as the embedding) has one entry.
      staged: whether the parameter's first axis is the stage.
      transposed: whether the tensors are stored as [in, out].
    """

    path: str
    variable: nnx.Variable
    stages: tuple[tuple[str, ...], ...]
    staged: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape on one stage with its outputs first, without the axis of stages."""
        shape = self.variable.shape[1:] if self.staged else self.variable.shape
        return shape[::-1] if self.inputs_first else shape

    @property
    def inputs_first(self) -> bool:
        """Whether the parameter is a matrix that is kept as [in, out]."""
        return self.variable.get_metadata().get("inputs_first", False)

    @property
    def is_quantized(self) -> bool:
        """Whether it is kept as int8 and has scales beside it, in a parameter that the checkpoint does not have."""
        return "float_dtype" in self.variable.get_metadata()

    @property
    def loaded_dtype(self) -> np.dtype:
        """The dtype in which its tensors are read."""
        return np.dtype(np.float32 if self.is_quantized else self.variable.dtype)

    @property
    def parts(self) -> tuple[FusedPart, ...]:
        """What each tensor contributes; all rows of a single tensor unless the variable declares its parts."""
        return self.variable.get_metadata().get("parts", (FusedPart(*self.shape[:1]),))

    def num_interleaved(self, num_shards: int) -> int:
        """Over how many shards the parts are interleaved; 1 where each part lies in the parameter as a whole.

        That is so for a single part, and for experts, of which each shard holds some whole.
        """
        whole = len(self.parts) == 1 or self.variable.get_metadata().get("whole_parts", False)
        return 1 if whole else num_shards

    def part_source(self, stage: int, part: int) -> tuple[str, int]:
        """The name of the tensor that holds a part of one stage, and the part's first row in that tensor."""
        names = self.stages[stage]
        if len(names) == len(self.parts):
            return names[part], 0
        return names[0], sum(rows.stored for rows in self.parts[:part])

    def stored_shape(self, stage: int, number: int) -> tuple[int, ...]:
        """The shape that tensor `number` of one stage must have in the checkpoint."""
        rows = [part.stored for part in self.parts]
        shape = (rows[number] if len(self.stages[stage]) == len(rows) else sum(rows), *self.shape[1:])
        return shape[::-1] if self.transposed else shape


def name_parameters(
    state: nnx.State, family: ModelFamily, num_layers: int, *, base_prefix: str = ""
) -> dict[tuple[Any, ...], NamedParameter]:
    """Matches every parameter of a model with its checkpoint tensors; scales of int8 matrices, which have none, are not
    among them.

    Args:
      state: the model's state, abstract or not.
      family: the family, which has the names.
      num_layers: layers of the model; further layers only pad the stages.
      base_prefix: prefix to remove from the names, see missing_prefix.

    Returns:
      nnx path -> NamedParameter, in the model's order.
    """
    flat = dict(nnx.to_flat_state(state))
    return {
        path: _describe(".".join(map(str, path)), variable, family, num_layers, base_prefix)
        for path, variable in flat.items()
        if not variable.get_metadata().get("is_scale", False)
    }


def scale_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The nnx path of the scales of an int8 matrix, from the matrix's own."""
    *place, name = path
    return (*place, f"{name}{SCALE}")


def missing_prefix(family: ModelFamily, found: Iterable[str]) -> str:
    """The prefix that a checkpoint's names lack: the family's base_prefix if no name begins with it, else ""."""
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
