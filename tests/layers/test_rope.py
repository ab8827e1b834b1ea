"""Rotary frequencies of every rule against its formula, one number at a time; rotation against complex numbers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config.model_config import RopeConfig
from jaxinfer.layers.rope import rotary_frequencies, rotary_tables, rotate

LLAMA3 = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_len=8192)
YARN = RopeConfig(theta=10000.0, kind="yarn", factor=16.0, original_max_len=4096)


def default(rope: RopeConfig, i: int, head_dim: int) -> float:
    return 1.0 / rope.theta ** (2 * i / head_dim)


def llama3(rope: RopeConfig, i: int, head_dim: int) -> float:
    """Meta's own three cases, by wavelength."""
    frequency = default(rope, i, head_dim)
    wavelength = 2 * math.pi / frequency
    if wavelength < rope.original_max_len / rope.high_freq_factor:
        return frequency
    if wavelength > rope.original_max_len / rope.low_freq_factor:
        return frequency / rope.factor
    smooth = rope.original_max_len / wavelength - rope.low_freq_factor
    smooth /= rope.high_freq_factor - rope.low_freq_factor
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def yarn(rope: RopeConfig, i: int, head_dim: int) -> float:
    """A linear ramp over dimensions, between those that turn beta_fast and beta_slow times in the original context."""
    edges = [
        head_dim * math.log(rope.original_max_len / (2 * math.pi * turns)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    ]
    if rope.truncate:
        edges = [math.floor(edges[0]), math.ceil(edges[1])]
    low, high = max(edges[0], 0), min(edges[1], head_dim - 1)
    ramp = min(1.0, max(0.0, (i - low) / (high - low)))
    return default(rope, i, head_dim) * ((1 - ramp) + ramp / rope.factor)


RULES = {
    "default": (RopeConfig(theta=500.0), default),
    "linear": (RopeConfig(kind="linear", factor=4.0), lambda rope, i, dim: default(rope, i, dim) / 4),
    "llama3": (LLAMA3, llama3),
    "yarn": (YARN, yarn),
    "yarn_clamped": (
        RopeConfig(theta=10.0, kind="yarn", factor=4.0, original_max_len=4096, beta_fast=1000.0),
        yarn,
    ),
    "yarn_fractional": (RopeConfig(kind="yarn", factor=4.0, original_max_len=64, truncate=False, beta_fast=8.0), yarn),
}


@pytest.mark.parametrize("head_dim", [20, 64, 128])
@pytest.mark.parametrize("rule", RULES)
def test_rotary_frequencies_rule_equals_formula(rule: str, head_dim: int) -> None:
    rope, formula = RULES[rule]
    frequencies, _ = rotary_frequencies(rope, head_dim, max_model_len=128)
    expected = [formula(rope, i, head_dim) for i in range(head_dim // 2)]
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=2**-23)  # float64 arithmetic, rounded once


@pytest.mark.parametrize(("max_model_len", "stretch"), [(32, 1.0), (64, 1.0), (128, 5.0), (256, 13.0)])
def test_rotary_frequencies_dynamic_stretches_base_with_context(max_model_len: int, stretch: float) -> None:
    rope = RopeConfig(kind="dynamic", factor=4.0, original_max_len=64)  # 4 * length / 64 - 3, at least 1
    frequencies, factor = rotary_frequencies(rope, 32, max_model_len=max_model_len)
    base = 10000.0 * stretch ** (32 / 30)
    np.testing.assert_allclose(frequencies, [base ** (-2 * i / 32) for i in range(16)], rtol=2**-23)
    assert factor == 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.1 * math.log(16) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1)),
        ({"mscale": 1.0}, 0.1 * math.log(16) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_rotary_frequencies_yarn_attention_factor_equals_formula(fields, expected: float) -> None:
    rope = RopeConfig(**({"kind": "yarn", "factor": 16.0, "original_max_len": 4096} | fields))
    assert rotary_frequencies(rope, 64, max_model_len=128)[1] == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["default", "linear", "llama3"])
def test_rotary_frequencies_other_rules_have_no_attention_factor(rule: str) -> None:
    assert rotary_frequencies(RULES[rule][0], 64, max_model_len=128)[1] == 1.0


def test_rotate_pairs_equals_complex_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 4000])
    frequencies, _ = rotary_frequencies(RopeConfig(), 8, max_model_len=128)
    tables = rotary_tables(jnp.asarray(positions), frequencies, 1.5)
    turns = 1.5 * np.exp(1j * positions[:, None] * frequencies.astype(np.float64))[:, None, :]
    product = (x[..., :4] + 1j * x[..., 4:]) * turns
    rotated = np.asarray(rotate(jnp.asarray(x), tables))
    # Position 4000 times a float32 frequency is off by up to 4000 * 2**-24 radians.
    np.testing.assert_allclose(rotated, np.concatenate([product.real, product.imag], -1), atol=2e-3)
    np.testing.assert_array_equal(rotated[0], np.float32(1.5) * x[0])


def test_rotate_bfloat16_keeps_dtype() -> None:
    tables = rotary_tables(jnp.arange(3), np.ones(2, np.float32), 1.0)
    assert rotate(jnp.ones((3, 1, 4), jnp.bfloat16), tables).dtype == jnp.bfloat16


LONGROPE = RopeConfig(
    kind="longrope", factor=32.0, original_max_len=4096, short_factors=(1.0, 1.5), long_factors=(2.0, 8.0)
)


@pytest.mark.parametrize(("max_model_len", "factors"), [(4096, (1.0, 1.5)), (4097, (2.0, 8.0))])
def test_rotary_frequencies_longrope_is_chosen_once_by_the_context(max_model_len, factors) -> None:
    frequencies, attention_factor = rotary_frequencies(LONGROPE, 4, max_model_len=max_model_len)
    np.testing.assert_allclose(frequencies, [1 / factors[0], 0.01 / factors[1]], rtol=1e-6)
    assert attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_rotate_leaves_the_unrotated_share_alone() -> None:
    rule = RopeConfig(theta=100.0, rotated_share=0.5)
    frequencies, factor = rotary_frequencies(rule, 8, max_model_len=16)
    x = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    tables = rotary_tables(jnp.arange(3), frequencies, factor)
    rotated = np.asarray(rotate(jnp.asarray(x), tables))
    np.testing.assert_array_equal(rotated[..., 4:], x[..., 4:])
    np.testing.assert_allclose(rotated[..., :4], rotate(jnp.asarray(x[..., :4]), tables), rtol=1e-6)
    assert np.abs(rotated[1:, :, :4] - x[1:, :, :4]).max() > 0.1
