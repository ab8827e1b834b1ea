"""Architectures: found by name, refused in words, and every one builds what its table of tensors names."""

from __future__ import annotations

import re

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxinfer.models import llama
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import Decoder, find_family, known_architectures, parse_model_config

FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def layout(num_stages: int) -> Layout:
    return Layout(
        num_stages=num_stages,
        num_shards=1,
        dtype=jnp.dtype("float32"),
        max_model_len=16,
        attention_backend="reference",
    )


def test_find_family_known_name_returns_it() -> None:
    assert find_family("LlamaForCausalLM") is llama.FAMILY
    assert "LlamaForCausalLM" in known_architectures() == sorted(known_architectures())


@pytest.mark.parametrize("name", ["GPT5", "", "os", "llama"])
def test_find_family_unknown_name_lists_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown architecture '{name}'; known: .*LlamaForCausalLM"):
        find_family(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT5"]}, "unknown architecture 'GPT5'; known: "),
        ({"architectures": None}, "must name one architecture, got None"),
        ({"architectures": []}, "must name one architecture"),
        ({"architectures": [["LlamaForCausalLM"]]}, "must name one architecture, got .*'LlamaForCausalLM'"),
        ({"architectures": ["LlamaForCausalLM", "B"]}, "must name one architecture"),
        ({"architectures": "LlamaForCausalLM"}, "must name one architecture"),
        ({"auto_map": {}}, "remote code .auto_map., which is never executed"),
    ],
)
def test_parse_model_config_unfit_architecture_raises(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model_config(FIELDS | change)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_build_every_parameter_has_spec_and_tensors(num_stages: int, tied: bool, bias: bool) -> None:
    config = parse_model_config(FIELDS | {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias})
    model = nnx.eval_shape(lambda: llama.FAMILY.build(config, layout(num_stages)))
    assert isinstance(model, Decoder)
    assert (model.head is model.embedding) == tied
    assert len(model.layers) == layout(num_stages).layers_per_stage(config) == -(-3 // num_stages)
    named = set()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert len(variable.get_metadata()["spec"]) <= len(variable.shape)
        named.add(re.sub(r"\.\d+\.", ".{layer}.", ".".join(map(str, path)), count=1))
    assert named <= llama.TENSOR_NAMES.keys()
    if bias and not tied:
        assert named == llama.TENSOR_NAMES.keys()
