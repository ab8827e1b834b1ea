"""Random weights for a model shape without a checkpoint, drawn by tensor name.

Owns: the tensor names and shapes that a config.json implies, the scale that keeps activations near one, drawing on the
host or on the devices, writing to disk.
Does not know: engines, timing.
"""

from __future__ import annotations

import functools
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from jaxinfer.checkpoint.directory import SINGLE_FILE
from jaxinfer.checkpoint.naming import NamedParameter, name_parameters
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import find_family

_BLOCK_VALUES = 2**18


class RandomStore:
    """A TensorStore whose tensors are drawn when they are read; values do not depend on the slices or their order.

    Matrices are uniform with variance 1 / inputs, biases are zero, and norms multiply by one.

    Args:
      config: the model's numbers.
      seed: of all tensors.

    Raises:
      ValueError: the architecture is unknown.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        self._config = config
        self._seed = seed
        parameters = _parameters(config)
        self._shapes = {name: shape for _, tensors in parameters for name, shape in tensors.items()}
        self._norms = {name for path, tensors in parameters if "norm.weight" in path for name in tensors}

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[name]

    def where(self, name: str) -> str:
        """Where a tensor comes from, for messages."""
        return "random weights"

    def read(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Draws a slice of one tensor into `out`, cast to its dtype.

        Args:
          name: of the tensor.
          index: start and stop along every axis.
          out: any float dtype, shaped as the slice.
        """
        if len(self.shape(name)) == 1:
            out[...] = 1 - self._config.norm_offset if name in self._norms else 0
            return
        rows, *others = index
        block_rows = max(1, _BLOCK_VALUES // int(np.prod(self.shape(name)[1:])))

        def fill(block: int) -> None:
            first = block * block_rows
            low, high = max(first, rows.start), min(first + block_rows, rows.stop)
            values = self._block(name, block, block_rows)
            out[low - rows.start : high - rows.start] = values[(slice(low - first, high - first), *others)]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(rows.start // block_rows, -(-rows.stop // block_rows))))

    def _block(self, name: str, block: int, block_rows: int) -> np.ndarray:
        columns = self.shape(name)[1:]
        source = np.random.SFC64(np.random.SeedSequence((self._seed, zlib.crc32(name.encode()), block)))
        values = np.random.Generator(source).random((block_rows, *columns), dtype=np.float32)
        values -= 0.5
        values *= np.float32((12 / columns[-1]) ** 0.5)
        return values


class DeviceRandomStore(RandomStore):
    """Random weights of the same distribution, drawn on the devices: an 8B shape takes seconds instead of minutes.

    The values differ from RandomStore's, and differ from one mesh to another; use RandomStore where two programs must
    have equal weights.
    """

    def make(self, parameter: NamedParameter, sharding: NamedSharding) -> jax.Array:
        """Draws one parameter on the mesh.

        Args:
          parameter: its path, shape and dtype; layers that only pad the stages become zero.
          sharding: of the array.
        """
        is_norm = "norm.weight" in parameter.path
        draw = _drawer(
            parameter.variable.shape[: -len(parameter.shape)] + parameter.shape,
            parameter.loaded_dtype,
            sharding,
            is_vector=len(parameter.shape) == 1,
            inputs_first=parameter.inputs_first,
        )
        key = jax.random.fold_in(jax.random.key(self._seed), zlib.crc32(parameter.path.encode()))
        live = np.array([bool(names) for names in parameter.stages], np.float32)
        return draw(key, live if parameter.staged else live[0], 1 - self._config.norm_offset if is_norm else 0)


@functools.cache
def _drawer(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, *, is_vector: bool, inputs_first: bool
) -> Any:
    """A jitted function that draws an array. Parameters of the same shape share it, so that few programs compile."""

    def draw(key: jax.Array, live: jax.Array, constant: float) -> jax.Array:
        scale = jnp.reshape(live, live.shape + (1,) * (len(shape) - live.ndim))
        if is_vector:
            return jnp.broadcast_to(scale * constant, shape).astype(dtype)
        bound = math.sqrt(3 / shape[-1])  # uniform in -bound .. bound has variance bound^2 / 3
        values = (jax.random.uniform(key, shape, jnp.float32, -bound, bound) * scale).astype(dtype)
        return values.swapaxes(-1, -2) if inputs_first else values

    return jax.jit(draw, out_shardings=sharding)


def _parameters(config: ModelConfig) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Every parameter's path, and the shapes of its checkpoint tensors by name."""
    family = find_family(config.architecture)
    layout = Layout(
        num_stages=1,
        num_shards=1,
        dtype=jnp.dtype(jnp.float32),
        max_model_len=config.max_position_embeddings,
        attention_backend="reference",
    )
    state = nnx.state(nnx.eval_shape(lambda: family.build(config, layout)))
    return [
        (parameter.path, {name: parameter.stored_shape(0, number) for number, name in enumerate(parameter.stages[0])})
        for parameter in name_parameters(state, family, config.num_layers).values()
    ]


def write_checkpoint(store: RandomStore, fields: Mapping[str, Any], directory: Path) -> None:
    """Writes the store as a Hugging Face checkpoint in float32, so that other programs can load the same weights.

    Args:
      store: the tensors; memory holds all of them while the file is written.
      fields: of config.json.
      directory: an existing folder.
    """
    tensors = {name: np.empty(store.shape(name), np.float32) for name in store.names()}
    for name, tensor in tensors.items():
        store.read(name, tuple(slice(0, size) for size in tensor.shape), tensor)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(fields)))
