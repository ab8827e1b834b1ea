"""Layouts: what every stage and shard holds, and the numbers in the errors of impossible ones."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from jaxinfer.config.model_config import ModelConfig, RopeConfig
from jaxinfer.models.layout import Layout

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=11,
    hidden_size=24,
    num_layers=5,
    num_heads=12,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=24,
    max_position_embeddings=32,
    rope=RopeConfig(),
    windows=(None, 4, None, 4, 4),
)


def layout(num_stages: int = 1, num_shards: int = 1) -> Layout:
    return Layout(
        num_stages=num_stages,
        num_shards=num_shards,
        dtype=jnp.dtype("float32"),
        max_model_len=16,
        attention_backend="reference",
    )


def test_windows_every_stage_has_its_own_and_padding_adds_none() -> None:
    assert [layout(1).windows(CONFIG, index) for index in range(5)] == [(None,), (4,), (None,), (4,), (4,)]
    # Stages hold layers 0 1 2 | 3 4: the padding behind layer 4 takes what layer 2 has.
    assert [layout(2).windows(CONFIG, index) for index in range(3)] == [(None, 4), (4, 4), (None, None)]
    assert layout(5).windows(CONFIG, 0) == (None, 4, None, 4, 4)
    assert layout(2).windows(dataclasses.replace(CONFIG, windows=()), 1) == (None, None)


@pytest.mark.parametrize(("num_shards", "num_kv_heads", "copies"), [(1, 2, 1), (2, 2, 1), (4, 4, 2), (6, 6, 3)])
def test_kv_heads_are_copied_when_shards_outnumber_them(num_shards, num_kv_heads, copies) -> None:
    wide = layout(num_shards=num_shards)
    wide.check(CONFIG)
    assert (wide.num_kv_heads(CONFIG), wide.kv_copies(CONFIG)) == (num_kv_heads, copies)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({"num_stages": 6}, {}, "pipeline_parallel_size must be <= 5, the model's layers, got 6"),
        ({"num_shards": 8}, {}, "tensor_parallel_size must divide the model's 12 query heads, got 8"),
        ({"num_shards": 4}, {"ffn_size": 22}, "must divide the model's 22 feed-forward features, got 4"),
        ({"num_shards": 3}, {}, "must divide the model's 2 kv heads or be a multiple of them, got 3"),
        ({"num_shards": 4}, {"num_kv_heads": 6}, "must divide the model's 6 kv heads or be a multiple"),
    ],
)
def test_check_impossible_layout_names_the_numbers(sizes, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        layout(**sizes).check(dataclasses.replace(CONFIG, **change))


EXPERTS = {"num_experts": 6, "experts_per_token": 2, "expert_ffn_size": 5}


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({"num_shards": 4}, {}, "tensor_parallel_size must divide the model's 6 experts, got 4"),
        (
            {"num_stages": 2},
            {"dense_layers": (1, 2)},
            r"with pipeline_parallel_size 2, layers \[4\] with experts and layers \[1\] without stand at one place",
        ),
        ({"num_shards": 2}, {"ffn_size": 25, "dense_layers": (0,)}, "must divide the model's 25 feed-forward features"),
    ],
)
def test_check_impossible_layout_of_experts_names_the_numbers(sizes, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        layout(**sizes).check(dataclasses.replace(CONFIG, **EXPERTS | change))


def test_experts_stand_where_every_stage_has_them() -> None:
    """Stages hold layers 0 1 2 | 3 4; without dense layers their feed-forward's size does not matter."""
    config = dataclasses.replace(CONFIG, **EXPERTS, dense_layers=(0, 3))
    layout(2, 2).check(config)
    assert [layout(2).has_experts(config, index) for index in range(3)] == [False, True, True]
    layout(1, 3).check(dataclasses.replace(CONFIG, **EXPERTS, num_kv_heads=3, ffn_size=25))
