"""ModelConfig and RopeConfig: numbers that do not fit each other are refused, and the parameters are counted right."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from jaxinfer.config.model_config import ModelConfig, RopeConfig

SMALL = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2}
MODEL = SMALL | {"architecture": "A", "ffn_size": 8, "max_position_embeddings": 16, "rope": RopeConfig()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(({name: 0}, ValueError, f"{name} must be >= 1, got 0") for name in SMALL),
        *(({name: "8"}, TypeError, f"{name} must be an int") for name in SMALL),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 3}, ValueError, "head_dim must be even for rotary embeddings, got 3"),
        ({"max_position_embeddings": 1}, ValueError, "max_position_embeddings must be in 2..1073741824, got 1"),
    ],
)
def test_model_config_wrong_numbers_raise(change, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ModelConfig(**(MODEL | change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "spiral"}, "rope kind must be one of default, linear, .*, longrope, got 'spiral'"),
        ({"rotated_share": 0.0}, r"rotated_share must be in \(0, 1\], got 0.0"),
        ({"kind": "linear", "factor": 0.5}, "rope factor must be >= 1, got 0.5"),
        ({"kind": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "low_freq_factor must be below high_freq_factor"),
    ],
)
def test_rope_config_wrong_numbers_raise(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_num_parameters_equals_sum_of_shapes(qk_norm: str, tied: bool, bias: bool) -> None:
    config = ModelConfig(
        **(MODEL | {"num_layers": 3, "tie_word_embeddings": tied}),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        qk_norm=qk_norm,
    )
    q, kv, hidden, ffn, vocab = 4 * 2, 2 * 2, 8, 8, 8
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
    shapes += [(hidden,), (hidden,)]
    shapes += [(q,), (kv,), (kv,), (hidden,), (ffn,), (ffn,), (hidden,)] if bias else []
    shapes += [(2,), (2,)] if qk_norm == "head" else []
    shapes = 3 * shapes + [(vocab, hidden)] * (1 if tied else 2) + [(hidden,)]
    assert config.num_parameters == sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("value", [RopeConfig(), ModelConfig(**MODEL)], ids=lambda value: type(value).__name__)
def test_model_and_rope_config_are_frozen_hashable_and_picklable(value) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))
    assert pickle.loads(pickle.dumps(value)) == value and hash(value) == hash(dataclasses.replace(value))
