"""Loads checkpoint tensors onto the mesh: only the slices that its devices hold, each byte read once.

Owns: the checks that a checkpoint fits the model, and finding the slices that each device needs.
Does not know: any single family (it gets the names as data), file formats (it gets a TensorStore).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm.auto import tqdm

from jaxinfer.checkpoint.fusion import fused_rows, stored_rows
from jaxinfer.checkpoint.naming import NamedParameter, missing_prefix, name_parameters, scale_path
from jaxinfer.checkpoint.store import TensorStore
from jaxinfer.communication.mesh import TENSOR
from jaxinfer.layers.weight import quantizer
from jaxinfer.models.registry import ModelFamily

Bounds = tuple[tuple[int, int], ...]
"""The bounds of a slice of an array: (start, stop) along every axis."""
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_XLA_ALIGNMENT = 64
_BLOCK = 16


@runtime_checkable
class ParameterMaker(Protocol):
    """A store that makes whole parameters directly on the mesh; other stores are read slice by slice on the host.

    Random weights are made so, since making them on the host would take too long.
    """

    def make(self, parameter: NamedParameter, sharding: NamedSharding) -> jax.Array:
        """The parameter's array with this sharding; layers that only pad the stages must be zero."""
        ...


def load_parameters(
    model: nnx.Module,
    *,
    family: ModelFamily,
    num_layers: int,
    store: TensorStore,
    mesh: Mesh,
    progress: bool = True,
) -> nnx.State:
    """Reads a model's parameters from a store straight onto the mesh.

    One slice is read and transferred at a time, so that host memory holds at most two tensors beside the weights of
    devices whose memory it is (CPUs). Int8 matrices are read as float32 and rounded on the mesh.

    Args:
      model: abstract model (nnx.eval_shape), whose variables have their PartitionSpec in the metadata field `spec`.
      family: the names of its tensors, and how they are stored.
      num_layers: layers of the model. Further layers only pad the stages; their parameters stay zero, so they return
        their input.
      store: the tensors. A store that is a ParameterMaker is asked for whole parameters instead of slices.
      mesh: the devices to load them onto.
      progress: whether to show a progress bar (on terminals only).

    Returns:
      The model's state with arrays on the mesh.

    Raises:
      ValueError: a tensor is missing, unexpected, of a wrong shape or not of floats; the message names it.
    """
    prefix = missing_prefix(family, store.names())
    variables = nnx.state(model)
    parameters = name_parameters(variables, family, num_layers, base_prefix=prefix)
    variables = dict(nnx.to_flat_state(variables))
    _check_names(parameters.values(), store, family)
    for parameter in parameters.values():
        _check_shapes(parameter, store)
    loaded = {}
    bar = tqdm(parameters.items(), desc="loading", unit="tensor", disable=None if progress else True, leave=False)
    for path, parameter in bar:
        sharding = NamedSharding(mesh, parameter.variable.spec)
        if isinstance(store, ParameterMaker):
            array = store.make(parameter, sharding)
        else:
            array = _load(parameter, store, sharding)
        if parameter.is_quantized:
            array, scale = quantizer(sharding, array.ndim)(array)
            loaded[scale_path(path)] = variables[scale_path(path)].replace(scale)
        loaded[path] = parameter.variable.replace(array)
    return nnx.from_flat_state(loaded)


def _check_names(parameters: Collection[NamedParameter], store: TensorStore, family: ModelFamily) -> None:
    found = set(store.names())
    wanted = {name for parameter in parameters for names in parameter.stages for name in names}
    missing = sorted(wanted - found)
    if missing:
        raise ValueError(f"checkpoint lacks tensor {missing[0]}" + _and_more(missing))
    unexpected = sorted(name for name in found - wanted if not _may_ignore(name, wanted, family))
    if unexpected:
        where = store.where(unexpected[0])
        raise ValueError(f"unexpected tensor {unexpected[0]} in {where}" + _and_more(unexpected))


def _may_ignore(name: str, wanted: set[str], family: ModelFamily) -> bool:
    # Some checkpoints of tied models store a head, which is not needed, and old checkpoints store rotary frequencies.
    if _IGNORED.search(name) or (name == "lm_head.weight" and name not in wanted):
        return True
    return family.ignored is not None and bool(re.fullmatch(family.ignored, name.removeprefix(family.base_prefix)))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _load(parameter: NamedParameter, store: TensorStore, sharding: NamedSharding) -> jax.Array:
    variable = parameter.variable
    devices: dict[Bounds, list[jax.Device]] = {}  # a slice that several devices hold is read once
    for device, index in sharding.addressable_devices_indices_map(variable.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), variable.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    reader = _ParameterReader(parameter, store, num_shards=sharding.mesh.shape[TENSOR])
    arrays = []
    for bounds, replicas in devices.items():
        values = reader.read(bounds)
        arrays += [jax.device_put(values, device) for device in replicas]
        # Transfers are asynchronous and keep their source alive: without this wait, all slices could be in host memory.
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(variable.shape, sharding, arrays)


class _ParameterReader:
    """Reads slices of one parameter from the tensors that it is made of.

    Args:
      parameter: the parameter.
      store: the tensors.
      num_shards: tensor shards of the mesh.
    """

    def __init__(self, parameter: NamedParameter, store: TensorStore, *, num_shards: int):
        self._parameter = parameter
        self._store = store
        self._shards = parameter.num_interleaved(num_shards)
        self._copied: dict[tuple[str, int, int], np.ndarray] = {}  # rows with several copies (kv heads) are read once

    def read(self, bounds: Bounds) -> np.ndarray:
        """The slice with these bounds, in aligned memory; stages that only pad are zero."""
        if not self._parameter.inputs_first:
            return self._read(bounds)
        *stage, inputs, outputs = bounds
        outputs_first = self._read((*stage, outputs, inputs))
        out = _aligned_zeros([stop - start for start, stop in bounds], outputs_first.dtype)
        for position, matrix in enumerate(outputs_first):
            _transpose(matrix, out[position])
        return out

    def _read(self, bounds: Bounds) -> np.ndarray:
        """As read, with the outputs first."""
        parameter = self._parameter
        out = _aligned_zeros([stop - start for start, stop in bounds], parameter.loaded_dtype)
        if not parameter.staged:
            self._read_stage(0, bounds, out)
            return out
        for position, stage in enumerate(range(*bounds[0])):
            if parameter.stages[stage]:
                self._read_stage(stage, bounds[1:], out[position])
        return out

    def _read_stage(self, stage: int, bounds: Bounds, out: np.ndarray) -> None:
        (start, stop), *others = bounds
        rest = tuple(slice(low, high) for low, high in others)
        parts = self._parameter.parts
        position = 0
        for piece in fused_rows([part.size for part in parts], self._shards, start, stop):
            name, first = self._parameter.part_source(stage, piece.part)
            for low, high in stored_rows(parts[piece.part], piece.start, piece.stop):
                read = self._read_rows if parts[piece.part].copies == 1 else self._read_copy
                read(name, first + low, first + high, rest, out[position : position + high - low])
                position += high - low

    def _read_rows(self, name: str, start: int, stop: int, rest: tuple[slice, ...], out: np.ndarray) -> None:
        _read_slice(self._store, name, (slice(start, stop), *rest), out, transposed=self._parameter.transposed)

    def _read_copy(self, name: str, start: int, stop: int, rest: tuple[slice, ...], out: np.ndarray) -> None:
        key = (name, start, stop)
        if key not in self._copied:
            self._copied[key] = np.empty_like(out)
            self._read_rows(*key, rest, self._copied[key])
        out[...] = self._copied[key]


def _read_slice(store: TensorStore, name: str, index: tuple[slice, ...], out: np.ndarray, *, transposed: bool) -> None:
    if not transposed:
        store.read(name, index, out)
        return
    stored = np.empty(out.shape[::-1], out.dtype)
    store.read(name, index[::-1], stored)
    _transpose(stored, out)


def _transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """out[...] = matrix.T, in blocks of a cache line: up to seven times as fast for large matrices."""
    for start in range(0, len(matrix), _BLOCK):
        block = slice(start, start + _BLOCK)
        out[:, block] = matrix[block].T


def _aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros at an aligned address: XLA's CPU backend uses such memory as it is and would copy any other."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _XLA_ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _check_shapes(parameter: NamedParameter, store: TensorStore) -> None:
    for stage, names in enumerate(parameter.stages):
        for number, name in enumerate(names):
            expected = parameter.stored_shape(stage, number)
            if store.shape(name) != expected:
                raise ValueError(
                    f"tensor {name} in {store.where(name)} has shape {store.shape(name)}, expected {expected}"
                )
