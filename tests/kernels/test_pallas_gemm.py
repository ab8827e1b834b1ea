"""The linear layer of a few rows against numpy, with everything that can stand beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import count_kernels, lowered_for_gpu

from jaxinfer.kernels.pallas_gemm import few_rows_linear
from jaxinfer.layers.weight import dequantize, quantize


def arrays(num_rows, num_in, num_out, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(num_rows, num_in)), rng.normal(size=(num_out, num_in)) / num_in**0.5
    return tuple(jnp.asarray(array, dtype) for array in (x, weight, rng.normal(size=num_out)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# 31 outputs: the last block is half empty; 300 inputs: so is the last tile of the only block
@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(2, 64, 8), (8, 300, 31), (33, 96, 40), (63, 520, 17)])
def test_few_rows_linear_product_equals_numpy(num_rows, num_in, num_out, dtype):
    x, weight, _ = arrays(num_rows, num_in, num_out, dtype)
    y = jax.jit(few_rows_linear)(x, weight)
    assert y.shape == (num_rows, num_out) and y.dtype == dtype
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    tolerance = {"rtol": 1e-5, "atol": 4e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-3}  # one rounding
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, **tolerance)


@pytest.mark.parametrize("num_out", [20, 4100])  # 4100: wide tiles
@pytest.mark.parametrize("is_gated", [False, True])
def test_few_rows_linear_bias_and_gate_equal_numpy(is_gated, num_out):
    x, weight, bias = arrays(5, 300, num_out, "float32")
    gate = jax.nn.silu if is_gated else None
    y = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    half = num_out // 2
    expected = y[:, :half] / (1 + np.exp(-y[:, :half])) * y[:, half:] if is_gated else y
    found = jax.jit(lambda x, w, b: few_rows_linear(x, w, bias=b, gate=gate))(x, weight, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_gated", [False, True])
def test_few_rows_linear_int8_equals_numpy(is_gated):
    x, weight, bias = arrays(5, 300, 20, "bfloat16")
    values, scale = quantize(weight)
    gate = jax.nn.silu if is_gated else None
    y = np.asarray(x, np.float64) @ np.asarray(dequantize(values, scale, jnp.dtype("float32")), np.float64).T
    y += np.asarray(bias, np.float64)
    expected = y[:, :10] / (1 + np.exp(-y[:, :10])) * y[:, 10:] if is_gated else y
    found = jax.jit(lambda x, w, s, b: few_rows_linear(x, w, s, bias=b, gate=gate))(x, values, scale, bias)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_few_rows_linear_lowers_for_gpu_as_one_kernel():
    x, weight, bias = arrays(5, 300, 20, "bfloat16")
    call = lambda x, weight, bias: few_rows_linear(x, weight, bias=bias, gate=jax.nn.silu)  # noqa: E731
    assert count_kernels(lowered_for_gpu(call, x, weight, bias)) == 1
