"""Experts: the loop and the kernels for GPUs (interpreted) against every expert on every token."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import count_kernels, lowered_for_gpu

from jaxinfer.kernels.pallas_experts import MAX_TOKENS, ExpertScales, expert_groups
from jaxinfer.layers.moe import expert_dense, expert_loop
from jaxinfer.layers.weight import dequantize, quantize

MATRIX = pytest.mark.matrix
"""Pallas' interpreter takes a second to compile: CI runs the cases that differ most."""
QUICK = {(1, 3, False), (75, 3, False), (300, 1, True)}
CASES = [
    pytest.param(method, *case, marks=() if method is expert_loop or case in QUICK else MATRIX)
    for method in (expert_loop, expert_groups)
    for case in itertools.product((1, 5, 75, 300), (1, 3), (False, True))
]


@pytest.mark.parametrize(("method", "num_tokens", "num_chosen", "crowded"), CASES)
def test_experts_any_tokens_equal_dense(method, num_chosen: int, num_tokens: int, crowded: bool) -> None:
    """Crowded: all tokens go to the first experts. Choice 5 of 5 experts is none (another shard's, or padding)."""
    rng = np.random.default_rng(num_tokens)
    high = num_chosen if crowded else 6
    chosen = [rng.permutation(high)[:num_chosen] for _ in range(num_tokens)]
    x, gate_up, down = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((num_tokens, 8), (5, 12, 8), (5, 8, 6))
    )
    shares = jnp.asarray(rng.random((num_tokens, num_chosen)), jnp.float32)
    arguments = (x, jnp.asarray(chosen, jnp.int32), shares, gate_up, down)
    expected, found = (jax.jit(partial(call, gate=jax.nn.silu))(*arguments) for call in (expert_dense, method))
    # Sums of 8 float32 products in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [expert_dense, expert_loop, expert_groups])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_int8_equal_what_they_stand_for(method, num_tokens) -> None:
    rng = np.random.default_rng(num_tokens)
    chosen = jnp.asarray([rng.permutation(5)[:2] for _ in range(num_tokens)], jnp.int32)
    shares = jnp.asarray(rng.random((num_tokens, 2)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((num_tokens, 8)), jnp.float32)
    matrices = [quantize(jnp.asarray(rng.standard_normal(shape))) for shape in ((5, 12, 8), (5, 8, 6))]
    values, scales = zip(*matrices, strict=True)
    floats = [dequantize(*matrix, jnp.dtype("float32")) for matrix in matrices]
    expected = expert_dense(x, chosen, shares, *floats, gate=jax.nn.silu)
    found = jax.jit(partial(method, gate=jax.nn.silu))(x, chosen, shares, *values, scales=ExpertScales(*scales))
    # Activations are rounded to 16 bits twice.
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("method", [expert_loop, expert_groups])
def test_experts_nobody_chosen_gives_zeros(method) -> None:
    x, none = jnp.ones((3, 4)), jnp.full((3, 2), 2, jnp.int32)
    y = method(x, none, jnp.ones((3, 2)), jnp.ones((2, 6, 4)), jnp.ones((2, 4, 3)), gate=jax.nn.silu)
    assert not np.asarray(y).any()


@pytest.mark.parametrize("method", [expert_loop, expert_groups])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_overflow_stays_with_its_token(method, num_tokens) -> None:
    """Token 0 and expert 0 give infinities; the other tokens go to expert 1."""
    x = jnp.ones((num_tokens, 4)).at[0].set(3e38)
    expert_ids = jnp.ones((num_tokens, 1), jnp.int32).at[0].set(0)
    gate_up, down = jnp.ones((2, 6, 4)).at[0].set(3e38), jnp.ones((2, 4, 3))
    y = method(x, expert_ids, jnp.ones((num_tokens, 1)), gate_up, down, gate=jax.nn.silu)
    assert np.isfinite(np.asarray(y[1:])).all()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "dtype"),
    [
        (MAX_TOKENS + 9, 3, "bfloat16"),
        (40, 70, "float32"),
        pytest.param(MAX_TOKENS + 9, 3, "float32", marks=MATRIX),
        pytest.param(40, 70, "bfloat16", marks=MATRIX),
    ],
)
def test_expert_groups_large_blocks_and_many_experts_equal_dense(num_tokens, num_experts, dtype) -> None:
    """Experts of 70 inputs and 100 outputs: more than one tile of each, the last one partly empty."""
    rng = np.random.default_rng(num_experts)
    chosen = np.stack([rng.permutation(num_experts)[:2] for _ in range(num_tokens)])
    x, gate_up, down = (
        jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, dtype)
        for shape in ((num_tokens, 70), (num_experts, 200, 70), (num_experts, 70, 100))
    )
    arguments = (x, jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((num_tokens, 2)), jnp.float32))
    arguments += (gate_up, down)
    expected, found = (jax.jit(partial(call, gate=jax.nn.silu))(*arguments) for call in (expert_dense, expert_groups))
    # Sums in another order. In bfloat16 both round each of the two experts' outputs (by 2**-9), at different points.
    tolerance = 1e-6 if dtype == "float32" else 2**-7 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance)


def test_expert_groups_lowers_for_gpu_as_three_kernels_without_loops() -> None:
    shape = jax.ShapeDtypeStruct
    weights = (shape((32, 1536, 2048), jnp.bfloat16), shape((32, 2048, 768), jnp.bfloat16))
    routes = (shape((32, 8), jnp.int32), shape((32, 8), jnp.float32))
    text = lowered_for_gpu(partial(expert_groups, gate=jax.nn.silu), shape((32, 2048), jnp.bfloat16), *routes, *weights)
    assert count_kernels(text) == 3
    assert "stablehlo.while" not in text and "stablehlo.sort" not in text
