"""`quantization="int8"`: equal to the float model that the integers stand for, on any mesh, through the whole API.

The float model is made by LLM.export, which multiplies the integers by their scales.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import on_mesh
from safetensors.numpy import load_file

import jaxinfer
from jaxinfer import LLM, SamplingParams, register_model
from jaxinfer.models import llama, registry
from jaxinfer.models.decoder import TransformerDecoder

BASE = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 16}
SCORED = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0, prompt_logprobs=0, ignore_eos=True)
PROMPTS = [list(range(20, 43)), [5], list(range(100, 60, -3))]
MATRIX = pytest.mark.matrix


def open_llm(path: Path, **fields) -> LLM:
    return LLM(path, **BASE | fields)


def found(llm: LLM) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Greedy tokens, and the log-probabilities of prompts and outputs."""
    outputs = llm.generate(PROMPTS, SCORED, use_tqdm=False)
    entries = [entry for out in outputs for entry in (*out.prompt_logprobs[1:], *out.logprobs)]
    return [out.token_ids for out in outputs], np.array([next(iter(entry.values())).logprob for entry in entries])


def rounded(weight: np.ndarray) -> np.ndarray:
    """A float matrix rounded row by row, in numpy."""
    scale = np.abs(weight).max(-1, keepdims=True) / np.float32(127)
    return np.rint(weight / np.where(scale == 0, 1, scale)) * scale


@pytest.mark.parametrize(
    "case", ["tied", "gemma3", "qwen3_moe", *(pytest.param(case, marks=MATRIX) for case in ("biases", "gpt2", "phi3"))]
)
def test_int8_scores_as_the_float_model_it_stands_for(case, tmp_path, few_programs):
    path = load_golden(case).path
    with open_llm(path, quantization="int8") as llm:
        tokens, logprobs = found(llm)
        matrices = {name for name, leaf in jax.tree_util.tree_leaves_with_path(llm.params) if leaf.dtype == jnp.int8}
        llm.export(tmp_path / "floats")
    with open_llm(tmp_path / "floats") as floats:
        assert matrices and not any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(floats.params))
        expected_tokens, expected = found(floats)
    with open_llm(path) as plain:
        _, unrounded = found(plain)
    assert tokens == expected_tokens
    error = np.abs(logprobs - expected).max()
    assert error < 2e-3 and error < np.abs(unrounded - expected).max() / 3


def test_int8_exports_the_rounded_tensors_of_the_checkpoint(tmp_path):
    path = load_golden("tied").path
    with open_llm(path, quantization="int8") as llm:
        llm.export(tmp_path / "floats")
    stored, exported = load_file(path / "model.safetensors"), load_file(tmp_path / "floats" / "model.safetensors")
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        expected = rounded(tensor.astype(np.float32)) if tensor.ndim == 2 else tensor
        np.testing.assert_allclose(exported[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("llama", (2, 2)), *(pytest.param(*place, marks=MATRIX) for place in (("mixtral", (1, 4)), ("gpt2", (4, 2))))],
)
def test_int8_on_a_mesh_has_the_integers_and_tokens_of_one_device(model, layout, few_programs):
    with on_mesh(model, (1, 1), quantization="int8") as one, on_mesh(model, layout, quantization="int8") as llm:
        (tokens, logprobs), (expected_tokens, expected) = found(llm), found(one)
        np.testing.assert_array_equal(*(np.asarray(x.params["embedding"]["weight"])[:301] for x in (llm, one)))
    assert tokens == expected_tokens
    np.testing.assert_allclose(logprobs, expected, atol=2e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("case", ["tied", "qwen3_moe"])
def test_int8_with_gpu_kernels_scores_as_without(case, few_programs):
    results = []
    for backend in ("xla", "pallas", "reference"):
        with open_llm(load_golden(case).path, quantization="int8", attention_backend=backend) as llm:
            results.append(found(llm))
    for tokens, logprobs in results[1:]:
        assert tokens == results[0][0]
        np.testing.assert_allclose(logprobs, results[0][1], atol=2e-3)


def is_down(name: str) -> bool:
    return name == "layers.0.mlp.down.weight"


def test_update_weights_rounds_floats_as_the_loader_does():
    path = load_golden("gqa").path
    with open_llm(path) as plain, open_llm(path, quantization="int8") as llm:
        before, floats = found(llm), jax.tree.map(np.asarray, plain.params)
        own = jax.tree.map(np.asarray, llm.params)
        doubled = jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 and x.ndim == 1 else x, own)
        llm.update_weights(doubled)
        assert found(llm)[1].tolist() != before[1].tolist()
        llm.update_weights(floats)
        np.testing.assert_array_equal(found(llm)[1], before[1])
        for given, kept in zip(jax.tree.leaves(own), jax.tree.leaves(llm.params), strict=True):
            np.testing.assert_array_equal(given, kept)
        down = floats["layers"]["0"]["mlp"]["down"]
        llm.update_weights({"layers": {"0": {"mlp": {"down": down}}}}, only=is_down)
        assert llm.weights_version == 3
        both = {"mlp": {"down": {**down, "weight_scale": own["layers"]["0"]["mlp"]["down"]["weight_scale"]}}}
        with pytest.raises(ValueError, match=r"layers.0.mlp.down.weight_scale follows from the floats"):
            llm.update_weights({"layers": {"0": both}}, only=is_down)
        integers = {"mlp": {"down": own["layers"]["0"]["mlp"]["down"]}}
        with pytest.raises(
            ValueError, match=r"chooses layers.0.mlp.down.weight without layers.0.mlp.down.weight_scale"
        ):
            llm.update_weights({"layers": {"0": integers}}, only=is_down)
        llm.update_weights({"layers": {"0": integers}}, only=lambda name: name.startswith("layers.0.mlp.down."))
        np.testing.assert_array_equal(found(llm)[1], before[1])
        short = {"mlp": {"down": {"weight": down["weight"][:, :-1]}}}
        with pytest.raises(ValueError, match=r"must be float32\[1, 48, 40\], got float32\[1, 47, 40\]"):
            llm.update_weights({"layers": {"0": short}}, only=is_down)


def test_saved_int8_weights_are_loaded_again(tmp_path):
    with open_llm(load_golden("gqa").path, quantization="int8") as llm:
        expected = found(llm)[1]
        llm.save_weights(tmp_path / "saved")
        llm.load_weights(tmp_path / "saved")
        llm.sleep()
        llm.wake_up()
        np.testing.assert_array_equal(found(llm)[1], expected)


def test_quantization_of_a_family_that_has_none_is_an_error(monkeypatch, tmp_path):
    def build(config, layout):
        return TransformerDecoder(config, dataclasses.replace(layout, quantization=None))

    monkeypatch.setattr(registry, "_REGISTERED", {})
    family = dataclasses.replace(llama.FAMILY, build=build)
    register_model("PlainForCausalLM", family)
    shutil.copytree(load_golden("gqa").path, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["PlainForCausalLM"]}))
    with pytest.raises(ValueError, match="PlainForCausalLM is registered without quantization"):
        open_llm(tmp_path / "model", quantization="int8")


def test_gradients_of_int8_weights_are_an_error():
    with (
        open_llm(load_golden("gqa").path, quantization="int8") as llm,
        pytest.raises(ValueError, match="logprob_fn needs float weights, got quantization 'int8'"),
    ):
        jaxinfer.logprob_fn(llm)
