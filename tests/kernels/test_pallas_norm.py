"""The addition to the residual stream with the norm behind it, against the layers that do both one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import count_kernels, lowered_for_gpu

from jaxinfer.kernels.pallas_gemv import RowNorm
from jaxinfer.kernels.pallas_norm import add_norm
from jaxinfer.layers.norm import LayerNorm, RMSNorm
from jaxinfer.layers.residual import PendingSum, added, settled, total

EPS = 1e-5


def arrays(num_tokens, num_features, dtype):
    rng = np.random.default_rng(num_features)
    x, y = rng.normal(size=(2, num_tokens, num_features))
    weight = 1 + 0.1 * rng.normal(size=num_features)
    return tuple(jnp.asarray(array, dtype) for array in (x, y, weight))


def rms_norm(weight, offset):
    norm = RMSNorm(len(weight), eps=EPS, num_stages=None, dtype=weight.dtype, offset=offset)
    norm.weight[...] = weight
    return norm


@pytest.mark.parametrize(("num_features", "offset"), [(96, 0.0), (1100, 1.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_norm_equals_addition_then_norm(num_features, dtype, offset):
    x, y, weight = arrays(3, num_features, dtype)
    norm = rms_norm(weight, offset)
    found, normed = jax.jit(lambda x, y, weight: add_norm(x, y, RowNorm(weight, EPS, offset)))(x, y, weight)
    expected = total(PendingSum(x, y))
    assert found.dtype == normed.dtype == dtype
    # Sums in another order; in bfloat16, a rounding that may fall on the other side.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2**-7, "atol": 2**-7}
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), **tolerance)
    np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(norm(expected), np.float32), **tolerance)


def test_add_norm_lowers_for_gpu_as_one_kernel():
    x, y, weight = arrays(3, 96, "bfloat16")
    text = lowered_for_gpu(lambda x, y, weight: add_norm(x, y, RowNorm(weight, EPS, 0.0)), x, y, weight)
    assert count_kernels(text) == 1


def test_settled_adds_with_the_norm_where_a_kernel_can():
    x, y, weight = arrays(3, 96, "float32")
    norm = rms_norm(weight, 0.0)
    stream = added(x, y, backend="pallas")
    new, fed, left = settled(stream, norm)
    assert left is None
    np.testing.assert_allclose(new, x + y, rtol=1e-6)
    np.testing.assert_allclose(fed, norm(x + y), rtol=1e-5, atol=1e-5)
    other = LayerNorm(96, eps=EPS, num_stages=None, dtype=weight.dtype)
    for norm_left in (None, other):  # no kernel has it
        new, fed, left = settled(stream, norm_left)
        assert left is norm_left and fed is new
        np.testing.assert_allclose(new, x + y, rtol=1e-6)


@pytest.mark.parametrize(("backend", "num_tokens"), [("xla", 3), ("pallas", 1)])
def test_added_elsewhere_is_an_array_at_once(backend, num_tokens):
    x, y, _ = arrays(num_tokens, 96, "float32")
    stream = added(x, y, backend=backend)
    assert settled(stream, None)[0] is stream
    np.testing.assert_array_equal(stream, x + y)
