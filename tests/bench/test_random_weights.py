"""Random weights: the same values for any slicing, the names a checkpoint has, activations of a sane size."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import CASES, load_golden
from flax import nnx

from jaxinfer.bench import random_weights
from jaxinfer.bench.random_weights import DeviceRandomStore, RandomStore, write_checkpoint
from jaxinfer.checkpoint.directory import read_json, weight_files
from jaxinfer.checkpoint.loader import load_parameters
from jaxinfer.checkpoint.store import SafetensorsStore
from jaxinfer.communication.mesh import make_mesh
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.models.registry import find_family, parse_model_config
from jaxinfer.wrappers.assembly import abstract_model, lay_out


def config_of(case):
    return parse_model_config(read_json(load_golden(case).path / "config.json"))


def read(store, name, *index):
    index = tuple(slice(*axis) for axis in index) or tuple(slice(0, size) for size in store.shape(name))
    out = np.empty([axis.stop - axis.start for axis in index], np.float32)
    store.read(name, index, out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_random_store_names_and_shapes_are_the_checkpoints(case):
    found, real = RandomStore(config_of(case)), SafetensorsStore(weight_files(load_golden(case).path))
    assert {name: found.shape(name) for name in found.names()} == {name: real.shape(name) for name in real.names()}


@pytest.mark.parametrize("block", [2**18, 100, 7])
def test_random_store_slices_equal_the_whole(monkeypatch, block):
    monkeypatch.setattr(random_weights, "_BLOCK_VALUES", block)
    store, name = RandomStore(config_of("gqa"), seed=5), "model.layers.1.mlp.down_proj.weight"
    whole = read(store, name)
    assert whole.shape == (48, 40)
    for rows in ((0, 1), (3, 48), (17, 18)):
        for columns in ((0, 40), (13, 29)):
            np.testing.assert_array_equal(read(store, name, rows, columns), whole[slice(*rows), slice(*columns)])
    np.testing.assert_array_equal(read(RandomStore(config_of("gqa"), seed=5), name), whole)


def test_random_store_tensors_differ_by_name_and_seed():
    store = RandomStore(config_of("gqa"))
    first, second = (read(store, f"model.layers.{layer}.mlp.up_proj.weight") for layer in (0, 1))
    assert (first != second).all()
    assert (first != read(RandomStore(config_of("gqa"), seed=1), "model.layers.0.mlp.up_proj.weight")).all()


def test_random_store_scale_keeps_variance():
    store = RandomStore(config_of("gqa"))
    values = read(store, "model.embed_tokens.weight")
    # 320 x 48 values: the standard error of the variance of a uniform is 0.9 / sqrt(15360) of it.
    assert values.var() * 48 == pytest.approx(1, abs=0.04)
    assert abs(values.mean()) < 0.01
    np.testing.assert_array_equal(read(store, "model.norm.weight"), 1)
    np.testing.assert_array_equal(read(RandomStore(config_of("gemma2")), "model.norm.weight"), 0)
    np.testing.assert_array_equal(read(RandomStore(config_of("biases")), "model.layers.0.self_attn.q_proj.bias"), 0)


def test_write_checkpoint_reads_back(tmp_path):
    fields = read_json(load_golden("tied").path / "config.json")
    store = RandomStore(parse_model_config(fields), seed=2)
    write_checkpoint(store, fields, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == fields
    written = SafetensorsStore(weight_files(tmp_path))
    assert set(written.names()) == set(store.names())
    for name in store.names():
        np.testing.assert_array_equal(read(written, name), read(store, name))


def drawn_parameters(config, *, inputs_first=False, **mesh):
    """A model's parameters as DeviceRandomStore draws them, by dotted path, matrices with their outputs first."""
    layout = lay_out(config, EngineConfig(**mesh), "cpu")
    model = abstract_model(config, dataclasses.replace(layout, inputs_first=inputs_first))
    parameters = load_parameters(
        model,
        family=find_family(config.architecture),
        num_layers=config.num_layers,
        store=DeviceRandomStore(config, seed=3),
        mesh=make_mesh(**{"pipeline_parallel_size": 1, "tensor_parallel_size": 1} | mesh),
        progress=False,
    )
    found = {}
    for path, leaf in nnx.to_flat_state(parameters):
        values = np.asarray(leaf[...])
        is_swapped = leaf.get_metadata().get("inputs_first", False)
        found[".".join(map(str, path))] = values.swapaxes(-1, -2) if is_swapped else values
    return found


@pytest.mark.parametrize("case", ["gqa", "biases", "gemma2", "qwen3_moe"])
def test_device_random_store_has_the_distribution_of_random_store(case):
    config = config_of(case)
    parameters = drawn_parameters(config)
    for path, values in parameters.items():
        if "norm.weight" in path:
            np.testing.assert_array_equal(values, 1 - config.norm_offset)
        elif "bias" in path:
            np.testing.assert_array_equal(values, 0)
        else:
            # At least 16 x 48 values: the standard error of the variance of a uniform is 0.9 / sqrt(768) of it.
            assert values.var() * values.shape[-1] == pytest.approx(1, abs=0.13), path
    matrices = [values.ravel()[:4].tolist() for values in parameters.values() if values.ndim == 3]
    assert len({tuple(values) for values in matrices}) == len(matrices)


def test_device_random_store_draws_the_same_whichever_axis_is_first():
    config = config_of("biases")
    for plain, swapped in zip(
        drawn_parameters(config).values(), drawn_parameters(config, inputs_first=True).values(), strict=True
    ):
        np.testing.assert_array_equal(plain, swapped)


def test_device_random_store_padding_layers_are_zero():
    parameters = drawn_parameters(config_of("tied"), pipeline_parallel_size=2)  # three layers on two stages of two
    first, second = (parameters[path] for path in sorted(path for path in parameters if "down" in path))
    assert first[0].any() and first[1].any() and second[0].any() and not second[1].any()
