"""Checkpoint tensors onto the mesh: every device's slices only, each byte read once.

Owns: matching parameters with checkpoint names, the checks, and the slices each device needs.
Does not know: families (it gets their names as data), file formats (it gets a TensorStore).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm.auto import tqdm

from jaxinfer.checkpoint.fusion import fused_rows
from jaxinfer.checkpoint.store import TensorStore
from jaxinfer.communication.mesh import TENSOR

Bounds = tuple[tuple[int, int], ...]
"""(start, stop) along every axis."""
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_XLA_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    """One parameter and the checkpoint tensors of each of its stages.

    Args:
      path: dotted path in the model.
      variable: the abstract nnx variable, with shape, dtype and spec.
      stages: tensor names by stage, an empty tuple for a padding layer; one entry for a parameter without stages.
      staged: the first axis is the stage.
    """

    path: str
    variable: nnx.Variable
    stages: tuple[tuple[str, ...], ...]
    staged: bool


def load_parameters(
    model: nnx.Module,
    *,
    tensor_names: Mapping[str, tuple[str, ...]],
    num_layers: int,
    store: TensorStore,
    mesh: Mesh,
    progress: bool = True,
) -> nnx.State:
    """Reads a model's parameters from a store straight onto the mesh.

    Host memory stays within the device's weights plus two tensors: one slice is on its way at a time.

    Args:
      model: abstract model (nnx.eval_shape), each variable with its PartitionSpec in `spec`.
      tensor_names: parameter path -> checkpoint tensors; "{layer}" stands for the layer's number.
      num_layers: layers of the model; further ones are padding and stay zero, which makes them the identity.
      store: the tensors.
      mesh: where they go.
      progress: show a bar (on terminals only).

    Returns:
      The model's state with arrays on the mesh.

    Raises:
      ValueError: a tensor is missing, unexpected, misshapen or no float; the message names it.
    """
    state = nnx.state(model)
    flat = dict(nnx.to_flat_state(state))
    parameters = {
        path: _describe(".".join(map(str, path)), variable, tensor_names, num_layers) for path, variable in flat.items()
    }
    _check_names(parameters.values(), store)
    for parameter in parameters.values():
        _check_shapes(parameter, store)
    loaded = {}
    bar = tqdm(parameters.items(), desc="loading", unit="tensor", disable=None if progress else True, leave=False)
    for path, parameter in bar:
        array = _load(parameter, store, mesh)
        loaded[path] = parameter.variable.replace(array)
    return nnx.from_flat_state(loaded)


def _describe(
    path: str, variable: nnx.Variable, tensor_names: Mapping[str, tuple[str, ...]], num_layers: int
) -> _Parameter:
    layer = re.search(r"\.(\d+)\.", path)
    if layer is None:
        return _Parameter(path=path, variable=variable, stages=(tensor_names[path],), staged=False)
    names = tensor_names[path.replace(layer.group(), ".{layer}.", 1)]
    num_stages = variable.shape[0]
    layers_per_stage = -(-num_layers // num_stages)
    numbers = [stage * layers_per_stage + int(layer.group(1)) for stage in range(num_stages)]
    stages = tuple(
        tuple(name.format(layer=number) for name in names) if number < num_layers else () for number in numbers
    )
    return _Parameter(path=path, variable=variable, stages=stages, staged=True)


def _check_names(parameters: Iterable[_Parameter], store: TensorStore) -> None:
    found = set(store.names())
    wanted = {name for parameter in parameters for names in parameter.stages for name in names}
    missing = sorted(wanted - found)
    if missing:
        raise ValueError(f"checkpoint lacks tensor {missing[0]}" + _and_more(missing))
    unexpected = sorted(name for name in found - wanted if not _may_ignore(name, wanted))
    if unexpected:
        where = store.where(unexpected[0])
        raise ValueError(f"unexpected tensor {unexpected[0]} in {where}" + _and_more(unexpected))


def _may_ignore(name: str, wanted: set[str]) -> bool:
    # A tied model needs no head of its own; old checkpoints carry one, and old ones the rotary frequencies.
    return bool(_IGNORED.search(name)) or (name == "lm_head.weight" and name not in wanted)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _load(parameter: _Parameter, store: TensorStore, mesh: Mesh) -> jax.Array:
    variable = parameter.variable
    sharding = NamedSharding(mesh, variable.spec)
    devices: dict[Bounds, list[jax.Device]] = {}  # replicas share a slice, which is read once
    for device, index in sharding.addressable_devices_indices_map(variable.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), variable.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    read = _reader(parameter, store, num_shards=mesh.shape[TENSOR])
    arrays = []
    for bounds, replicas in devices.items():
        values = read(bounds)
        arrays += [jax.device_put(values, device) for device in replicas]
        # Transfers are asynchronous and keep their source alive: without this wait all weights could pile up here.
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(variable.shape, sharding, arrays)


def _reader(parameter: _Parameter, store: TensorStore, *, num_shards: int) -> Callable[[Bounds], np.ndarray]:
    """A function that fills one slice of the parameter, given (start, stop) for each of its axes."""
    variable = parameter.variable

    def rows_of(names: tuple[str, ...], bounds: Bounds, out: np.ndarray) -> None:
        sizes = [store.shape(name)[0] for name in names]
        (start, stop), *others = bounds
        rest = tuple(slice(low, high) for low, high in others)
        position = 0
        shards = num_shards if len(names) > 1 else 1
        for rows in fused_rows(sizes, shards, start, stop):
            count = rows.stop - rows.start
            store.read(names[rows.part], (slice(rows.start, rows.stop), *rest), out[position : position + count])
            position += count

    def read(bounds: Bounds) -> np.ndarray:
        out = _aligned_zeros([stop - start for start, stop in bounds], np.dtype(variable.dtype))
        if not parameter.staged:
            rows_of(parameter.stages[0], bounds, out)
            return out
        for position, stage in enumerate(range(*bounds[0])):
            if parameter.stages[stage]:
                rows_of(parameter.stages[stage], bounds[1:], out[position])
        return out

    return read


def _aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that XLA's CPU backend can take over as they are; elsewhere in memory it copies them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _XLA_ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _check_shapes(parameter: _Parameter, store: TensorStore) -> None:
    shape = parameter.variable.shape[1:] if parameter.staged else parameter.variable.shape
    # A fused parameter declares the rows of each part, a vocabulary its rows without padding.
    rows = parameter.variable.get_metadata().get("rows", (shape[0],))
    for names in parameter.stages:
        for name, count in zip(names, rows, strict=bool(names)):
            expected = (count, *shape[1:])
            if store.shape(name) != expected:
                raise ValueError(
                    f"tensor {name} in {store.where(name)} has shape {store.shape(name)}, expected {expected}"
                )
