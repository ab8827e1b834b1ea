"""Bytes and operations against numbers worked out by hand, floors, the datasheet table."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxinfer.bench.roofline import (
    DeviceRates,
    StepCost,
    datasheet_bytes_per_s,
    decode_cost,
    measure_rates,
    prefill_cost,
)
from jaxinfer.config.model_config import ModelConfig, RopeConfig
from jaxinfer.models.registry import parse_model_config

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    ffn_size=3,
    max_position_embeddings=32,
    rope=RopeConfig(original_max_len=32),
    tie_word_embeddings=True,
)
# A layer: Q 4x4, K and V 4x2 each, out 4x4, three 4x3, two norms of 4: 16 + 16 + 16 + 36 + 8 = 92. Two and a norm: 188.
# The table: 10 x 4 = 40.


@pytest.mark.parametrize("tied", [True, False])
def test_decode_cost_equals_hand_count(tied):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    cost = decode_cost(config, batch_size=3, context=5, itemsize=2)
    weights = 188 + 40  # an untied embedding is not read but for the rows' own entries
    kv = 3 * 5 * 2 * (2 * 1 * 2)  # rows, positions, layers, K and V of one head of 2
    assert cost.num_bytes == 2 * (weights + 3 * 4 + kv) + 3 * 10 * 4 * 2
    assert cost.num_ops == 3 * (2 * weights + 5 * 2 * (2 * 2 * 2 * 2))  # QK and PV: 2 heads x 2 x 2 operations each


def test_decode_cost_window_bounds_the_context():
    windowed = dataclasses.replace(TINY, windows=(3, None))
    full, less = (decode_cost(config, batch_size=1, context=8, itemsize=4) for config in (TINY, windowed))
    assert full.num_bytes - less.num_bytes == 5 * (2 * 1 * 2) * 4
    assert full.num_ops - less.num_ops == 5 * 16


def test_costs_of_experts_count_those_that_are_asked():
    """Layer 0 has four experts of 2 features, two of them a token: 4 x 3 x 4 x 2 = 96 weights and a router of 16."""
    config = dataclasses.replace(
        TINY, num_experts=4, experts_per_token=2, expert_ffn_size=2, dense_layers=(1,), tie_word_embeddings=True
    )
    others = 188 + 40 - 36 + 16
    one, two = (decode_cost(config, batch_size=count, context=5, itemsize=2) for count in (1, 2))
    attention = 5 * 2 * (2 * 2 * 2 * 2)
    assert one.num_ops == 2 * (others + 48) + attention and two.num_ops == 2 * one.num_ops
    kv = 5 * 2 * (2 * 1 * 2)
    assert one.num_bytes == 2 * (others + 48 + 4 + kv) + 10 * 4 * 2
    assert two.num_bytes == 2 * (others + 72 + 2 * (4 + kv)) + 2 * 10 * 4 * 2  # three of four experts, on average


def test_prefill_cost_equals_hand_count():
    cost = prefill_cost(TINY, batch_size=2, prompt_len=3, itemsize=4)
    kv = 6 * 2 * (2 * 1 * 2)  # tokens, layers, K and V of one head of 2; written and read
    assert cost.num_bytes == 4 * (188 + 40 + 6 * 4 + 2 * kv) + 2 * 10 * 4 * 2
    assert cost.num_ops == 2 * 188 * 6 + 2 * (2 * 40 + 2 * (1 + 2 + 3) * 16)


def test_decode_cost_of_8b_is_the_known_floor():
    config = parse_model_config(json.loads((CONFIGS / "bench-8b.json").read_text()))
    cost = decode_cost(config, batch_size=1, context=1024, itemsize=2)
    # shared/PERFORMANCE.md: 15.0 GB of weights and 128 KiB of KV a token.
    assert cost.num_bytes == pytest.approx(15.0e9 + 1024 * 128 * 1024, rel=2e-3)


@pytest.mark.parametrize(("name", "millions"), [("135m", 134.5), ("0.6b", 596.0), ("8b", 8030.3)])
def test_configs_have_the_published_sizes(name, millions):
    config = parse_model_config(json.loads((CONFIGS / f"bench-{name}.json").read_text()))
    assert config.num_parameters == pytest.approx(millions * 1e6, rel=1e-3)


def test_floor_is_the_longer_of_the_two():
    rates = DeviceRates(bytes_per_s=10.0, ops_per_s=100.0, datasheet_bytes_per_s=None)
    memory, compute = StepCost(num_bytes=20, num_ops=100), StepCost(num_bytes=20, num_ops=500)
    assert (memory.floor_s(rates), memory.bound(rates)) == (2.0, "memory")
    assert (compute.floor_s(rates), compute.bound(rates)) == (5.0, "compute")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H200", 4800e9),
        ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA H100 PCIe", 2000e9),
        ("NVIDIA A100-SXM4-40GB", 1555e9),
        ("NVIDIA A100-SXM4-80GB", 2039e9),
        ("NVIDIA L4", 300e9),
        ("NVIDIA L40S", 864e9),
        ("cpu", None),
    ],
)
def test_datasheet_by_device_kind(kind, expected):
    assert datasheet_bytes_per_s(kind) == expected


def test_measure_rates_are_positive():
    rates = measure_rates("float32", read_bytes=2**20, matmul_size=32)
    assert rates.bytes_per_s > 0 and rates.ops_per_s > 0
