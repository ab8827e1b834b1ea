"""Export: the tensors of a loaded checkpoint, byte for byte, whatever the layout."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from flax import nnx
from safetensors.numpy import load_file

from jaxinfer.checkpoint.exporter import export_parameters
from jaxinfer.checkpoint.loader import load_parameters
from jaxinfer.checkpoint.store import SafetensorsStore
from jaxinfer.communication.mesh import make_mesh
from jaxinfer.layers.linear import FusedPart
from jaxinfer.models import llama
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import find_family, parse_model_config


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("case", ["gqa", "biases", "tied", "qwen3", "phi3", "gpt2"])
def test_export_parameters_returns_what_was_loaded(case: str, inputs_first: bool) -> None:
    path = GOLDEN / case
    config = parse_model_config(json.loads((path / "config.json").read_text()))
    family = find_family(config.architecture)
    layout = Layout(
        num_stages=1,
        num_shards=1,
        dtype=jnp.dtype("float32"),
        max_model_len=16,
        attention_backend="reference",
        inputs_first=inputs_first,
    )
    state = load_parameters(
        nnx.eval_shape(lambda: family.build(config, layout)),
        family=family,
        num_layers=config.num_layers,
        store=SafetensorsStore([path / "model.safetensors"]),
        mesh=make_mesh(),
        progress=False,
    )
    exported = export_parameters(state, family=family, num_layers=config.num_layers)
    stored = load_file(path / "model.safetensors")
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


@pytest.mark.parametrize(("num_stages", "num_shards"), [(2, 1), (2, 2), (3, 2)])
def test_export_parameters_fused_and_stacked_come_apart(num_stages: int, num_shards: int) -> None:
    """Three layers on two stages leave one padding layer; row i of tensor n holds n * 1000 + i."""
    names = {"layers.{layer}.qkv.weight": ("{layer}.q", "{layer}.k"), "table.weight": ("table",)}
    local_layers = -(-3 // num_stages)
    sizes = (8, 4)

    def fused(layer: int) -> np.ndarray:
        parts = [layer * 1000 + part * 100 + np.arange(size) for part, size in enumerate(sizes)]
        shards = [np.split(part, num_shards) for part in parts]
        return np.concatenate([shards[part][shard] for shard in range(num_shards) for part in range(2)])[:, None]

    class Part(nnx.Module):
        def __init__(self, values: np.ndarray, sizes: tuple[int, ...]):
            self.weight = nnx.Param(jax.numpy.asarray(values), parts=tuple(map(FusedPart, sizes)))

    class Block(nnx.Module):
        def __init__(self, index: int):
            stages = [fused(stage * local_layers + index) for stage in range(num_stages)]
            self.qkv = Part(np.stack(stages), sizes)

    class Whole(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([Block(index) for index in range(local_layers)])
            self.table = Part(np.arange(6)[:, None], (5,))

    family = dataclasses.replace(llama.FAMILY, tensor_names=names)
    exported = export_parameters(nnx.state(Whole()), family=family, num_layers=3, num_shards=num_shards)
    assert sorted(exported) == ["0.k", "0.q", "1.k", "1.q", "2.k", "2.q", "table"]
    assert exported["table"].ravel().tolist() == [0, 1, 2, 3, 4]
    for layer in range(3):
        assert exported[f"{layer}.q"].ravel().tolist() == [layer * 1000 + i for i in range(8)]
        assert exported[f"{layer}.k"].ravel().tolist() == [layer * 1000 + 100 + i for i in range(4)]
