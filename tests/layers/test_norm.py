"""The norms against float64, in all of their places."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)]
)  # a few units in the last place
@pytest.mark.parametrize("num_stages", [None, 1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_rows_equal_float64(num_stages: int | None, dtype: str, tolerance: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(scale * rng.standard_normal((7, 48)), dtype)
    weight = jnp.asarray(1 + rng.standard_normal(48), dtype)
    norm = RMSNorm(48, eps=1e-5, num_stages=num_stages, dtype=jnp.dtype(dtype))
    assert norm.weight.shape == ((48,) if num_stages is None else (1, 48))
    norm.weight[...] = jnp.broadcast_to(weight, norm.weight.shape)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    result = norm(x)
    assert result.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_zeros_stay_zero() -> None:
    norm = RMSNorm(4, eps=1e-6, num_stages=None, dtype=jnp.dtype("float32"))
    norm.weight[...] = jnp.ones(4)
    assert not norm(jnp.zeros((2, 4))).any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2**-7)]
)  # a few units in the last place
@pytest.mark.parametrize("num_stages", [None, 1])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm_rows_equal_float64(num_stages: int | None, dtype: str, tolerance: float, mean: float) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(mean + rng.standard_normal((7, 48)), dtype)
    norm = LayerNorm(48, eps=1e-5, num_stages=num_stages, dtype=jnp.dtype(dtype))
    weight, bias = (jnp.asarray(rng.standard_normal(48), dtype) for _ in range(2))
    norm.weight[...] = jnp.broadcast_to(weight, norm.weight.shape)
    norm.bias[...] = jnp.broadcast_to(bias, norm.bias.shape)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * np.asarray(weight, np.float64) + np.asarray(bias, np.float64)
    result = norm(x)
    assert result.dtype == x.dtype
    if dtype == "float32":
        tolerance *= 1 + mean  # taking off a mean costs float32 that many times its digits
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=tolerance, atol=tolerance)
