"""Experts: the loop and the batched products against every expert on every token."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.moe import expert_batched, expert_dense, expert_loop


@pytest.mark.parametrize("method", [expert_loop, expert_batched])
@pytest.mark.parametrize("num_chosen", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 5, 75, 300])
@pytest.mark.parametrize("crowded", [False, True])
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
    expected, found = (jax.jit(partial(call, activation="silu"))(*arguments) for call in (expert_dense, method))
    # Sums of 8 float32 products in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [expert_loop, expert_batched])
def test_experts_nobody_chosen_gives_zeros(method) -> None:
    x, none = jnp.ones((3, 4)), jnp.full((3, 2), 2, jnp.int32)
    y = method(x, none, jnp.ones((3, 2)), jnp.ones((2, 6, 4)), jnp.ones((2, 4, 3)), activation="silu")
    assert not np.asarray(y).any()


@pytest.mark.parametrize("method", [expert_loop, expert_batched])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_overflow_stays_with_its_token(method, num_tokens) -> None:
    """Token 0 and expert 0 give infinities; the other tokens go to expert 1."""
    x = jnp.ones((num_tokens, 4)).at[0].set(3e38)
    expert_ids = jnp.ones((num_tokens, 1), jnp.int32).at[0].set(0)
    gate_up, down = jnp.ones((2, 6, 4)).at[0].set(3e38), jnp.ones((2, 4, 3))
    y = method(x, expert_ids, jnp.ones((num_tokens, 1)), gate_up, down, activation="silu")
    assert np.isfinite(np.asarray(y[1:])).all()
