"""Loading a checkpoint without an engine, and the way back from loaded parameters to checkpoint tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxinfer.checkpoint.directory import read_json, weight_files
from jaxinfer.checkpoint.fusion import unfuse
from jaxinfer.checkpoint.loader import load_parameters
from jaxinfer.checkpoint.store import SafetensorsStore
from jaxinfer.communication.mesh import make_mesh
from jaxinfer.layers.linear import FusedPart
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import find_family, parse_model_config


@dataclass(frozen=True)
class Loaded:
    """Parameters on the mesh, the checkpoint tensors they unfuse to, and the store they came from."""

    parameters: nnx.State
    tensors: dict[str, np.ndarray]
    store: SafetensorsStore


def load(path: Path, *, num_stages: int = 1, num_shards: int = 1, dtype: str = "float32", inputs_first=False) -> Loaded:
    config = parse_model_config(read_json(path / "config.json"))
    family = find_family(config.architecture)
    layout = Layout(
        num_stages=num_stages,
        num_shards=num_shards,
        dtype=jnp.dtype(dtype),
        max_model_len=64,
        attention_backend="reference",
        inputs_first=inputs_first,
    )
    store = SafetensorsStore(weight_files(path))
    parameters = load_parameters(
        nnx.eval_shape(lambda: family.build(config, layout)),
        family=family,
        num_layers=config.num_layers,
        store=store,
        mesh=make_mesh(pipeline_parallel_size=num_stages, tensor_parallel_size=num_shards),
        progress=False,
    )
    tensors: dict[str, np.ndarray] = {}
    for path_, variable in nnx.to_flat_state(parameters):
        dotted = ".".join(map(str, path_))
        layer = re.search(r"\.(\d+)\.", dotted)
        key = re.sub(r"\.\d+\.", ".{layer}.", dotted, count=1)
        names = family.tensor_names[key]
        if "{expert}" in names[0]:
            names = [name.replace("{expert}", str(e)) for e in range(config.num_experts) for name in names]
        transposed = key in family.transposed
        values = np.asarray(variable[...])
        values = values.swapaxes(-1, -2) if "inputs_first" in variable.get_metadata() else values
        if layer is None:
            tensors |= _parts(names, values, variable, 1, transposed)
            continue
        for stage in range(num_stages):
            number = stage * layout.layers_per_stage(config) + int(layer.group(1))
            if number < config.num_layers:
                stage_names = [name.format(layer=number) for name in names]
                tensors |= _parts(stage_names, values[stage], variable, num_shards, transposed)
            else:
                assert not values[stage].any(), f"{dotted}: the padding layer {number} is not zero"
    return Loaded(parameters, tensors, store)


def _parts(
    names, values: np.ndarray, variable: nnx.Variable, num_shards: int, transposed: bool
) -> dict[str, np.ndarray]:
    rows = variable.get_metadata().get("parts", (FusedPart(values.shape[0]),))
    assert not values[sum(part.size for part in rows) :].any(), f"{names}: the padding rows are not zero"
    interleaved = len(rows) > 1 and "whole_parts" not in variable.get_metadata()
    parts = unfuse(values, rows, num_shards if interleaved else 1)
    parts = parts if len(names) == len(parts) else [np.concatenate(parts)]
    return dict(zip(names, (part.T if transposed else part for part in parts), strict=True))


def checkpoint_tensors(path: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads, file by file."""
    return {name: values for file in weight_files(path) for name, values in load_file(file).items()}


def assert_same_tensors(loaded: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert loaded.keys() == expected.keys()
    for name, values in loaded.items():
        assert np.array_equal(values, expected[name].astype(values.dtype)), name


def num_bytes(tensors: dict[str, np.ndarray]) -> int:
    return sum(values.nbytes for values in tensors.values())
