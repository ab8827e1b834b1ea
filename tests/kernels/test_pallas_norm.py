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


def arrays(num_tokens, num_features, num_parts, dtype, part_dtype):
    rng = np.random.default_rng(num_features)
    x, parts = rng.normal(size=(num_tokens, num_features)), rng.normal(size=(num_parts, num_tokens, num_features))
    weight = 1 + 0.1 * rng.normal(size=num_features)
    return jnp.asarray(x, dtype), jnp.asarray(parts, part_dtype), jnp.asarray(weight, dtype)


def rms_norm(weight, offset):
    norm = RMSNorm(len(weight), eps=EPS, num_stages=None, dtype=weight.dtype, offset=offset)
    norm.weight[...] = weight
    return norm


@pytest.mark.parametrize(("num_features", "offset"), [(96, 0.0), (1100, 1.0)])
@pytest.mark.parametrize(
    ("num_parts", "dtype", "part_dtype"),
    [(1, "float32", "float32"), (1, "bfloat16", "bfloat16"), (4, "bfloat16", "float32")],
)
def test_add_norm_equals_addition_then_norm(num_features, num_parts, dtype, part_dtype, offset):
    x, parts, weight = arrays(3, num_features, num_parts, dtype, part_dtype)
    norm = rms_norm(weight, offset)
    found, normed = jax.jit(lambda x, parts, weight: add_norm(x, parts, RowNorm(weight, EPS, offset)))(x, parts, weight)
    expected = total(PendingSum(x, parts))
    assert found.dtype == normed.dtype == dtype
    # Sums in another order; in bfloat16, a rounding that may fall on the other side.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2**-7, "atol": 2**-7}
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), **tolerance)
    np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(norm(expected), np.float32), **tolerance)


def test_add_norm_lowers_for_gpu_as_one_kernel():
    x, parts, weight = arrays(3, 96, 4, "bfloat16", "float32")
    text = lowered_for_gpu(lambda x, parts, weight: add_norm(x, parts, RowNorm(weight, EPS, 0.0)), x, parts, weight)
    assert count_kernels(text) == 1


def test_settled_adds_with_the_norm_where_a_kernel_can():
    x, parts, weight = arrays(3, 96, 1, "float32", "float32")
    norm = rms_norm(weight, 0.0)
    stream = added(x, parts[0], backend="pallas")
    new, fed, left = settled(stream, norm)
    assert left is None
    np.testing.assert_allclose(new, x + parts[0], rtol=1e-6)
    np.testing.assert_allclose(fed, norm(x + parts[0]), rtol=1e-5, atol=1e-5)
    other = LayerNorm(96, eps=EPS, num_stages=None, dtype=weight.dtype)
    for norm_left in (None, other):  # no kernel has it
        new, fed, left = settled(stream, norm_left)
        assert left is norm_left and fed is new
        np.testing.assert_allclose(new, x + parts[0], rtol=1e-6)


@pytest.mark.parametrize(("backend", "num_tokens"), [("xla", 3), ("pallas", 1)])
def test_added_elsewhere_is_an_array_at_once(backend, num_tokens):
    x, parts, _ = arrays(num_tokens, 96, 1, "float32", "float32")
    stream = added(x, parts[0], backend=backend)
    assert settled(stream, None)[0] is stream
    np.testing.assert_array_equal(stream, x + parts[0])
