"""The linear layer of one row against numpy, with everything that can stand beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import count_kernels, lowered_for_gpu

from jaxinfer.kernels.pallas_gemv import RowNorm, one_row_linear
from jaxinfer.layers.weight import dequantize, quantize

EPS = 1e-5


def silu(x):
    return x / (1 + np.exp(-x))


def arrays(num_in, num_out, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, norm, bias = (rng.normal(size=size) for size in ((1, num_in), num_in, num_out))
    weight = rng.normal(size=(num_out, num_in)) / num_in**0.5
    return tuple(jnp.asarray(array, dtype) for array in (x, weight, 1 + 0.1 * norm, bias))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 8), (5000, 6), (96, 31)])  # 31: the last block is half empty
def test_one_row_linear_product_equals_numpy(num_in, num_out, dtype):
    x, weight, *_ = arrays(num_in, num_out, dtype)
    y = jax.jit(one_row_linear)(x, weight)
    assert y.shape == (1, num_out) and y.dtype == dtype
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-4}  # one rounding
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, **tolerance)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("is_gated", [False, True])
def test_one_row_linear_norm_bias_gate_and_residual_equal_numpy(is_gated, offset):
    x, weight, norm, bias = arrays(300, 20, "float32")
    residual = jnp.ones((1, 10 if is_gated else 20), jnp.float32) * 3
    options = {"norm": RowNorm(norm, EPS, offset), "bias": bias, "residual": residual}
    options |= {"gate": jax.nn.silu} if is_gated else {}
    wide, weights, norms = (np.asarray(array, np.float64) for array in (x, weight, norm))
    y = wide / np.sqrt((wide**2).mean() + EPS) * (norms + offset) @ weights.T + np.asarray(bias, np.float64)
    expected = 3 + (silu(y[:, :10]) * y[:, 10:] if is_gated else y)
    found = jax.jit(lambda x, w: one_row_linear(x, w, **options))(x, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_one_row_linear_int8_with_norm_bias_and_gate_equals_numpy():
    x, weight, norm, bias = arrays(300, 20, "bfloat16")
    values, scale = quantize(weight)
    wide, norms = np.asarray(x, np.float64), np.asarray(norm, np.float64)
    weights = np.asarray(dequantize(values, scale, jnp.dtype("float32")), np.float64)
    y = wide / np.sqrt((wide**2).mean() + EPS) * norms @ weights.T + np.asarray(bias, np.float64)
    options = {"norm": RowNorm(norm, EPS, 0.0), "bias": bias, "gate": jax.nn.silu}
    found = jax.jit(lambda x, w, s: one_row_linear(x, w, s, **options))(x, values, scale)
    np.testing.assert_allclose(np.asarray(found, np.float64), silu(y[:, :10]) * y[:, 10:], rtol=2**-8, atol=1e-3)


def test_one_row_linear_lowers_for_gpu_as_one_kernel():
    x, weight, norm, bias = arrays(300, 20, "bfloat16")

    def call(x, weight, norm, bias):
        return one_row_linear(x, weight, norm=RowNorm(norm, EPS, 0.0), bias=bias, gate=jax.nn.silu)

    assert count_kernels(lowered_for_gpu(call, x, weight, norm, bias)) == 1
