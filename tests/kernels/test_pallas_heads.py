"""Norms of heads, rotation and cache write in one kernel against the layers that do it step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import count_kernels, lowered_for_gpu

from jaxinfer.kernels.pallas_heads import HeadNorm, rotate_and_write
from jaxinfer.layers import kv_cache, rope
from jaxinfer.layers.kv_cache import LayerCache

PAGE_SIZE, EPS = 8, 1e-5


def make_case(num_tokens, num_heads, num_kv_heads, head_dim, num_pairs, dtype):
    rng = np.random.default_rng(0)
    heads = jnp.asarray(rng.normal(size=(num_tokens, num_heads + 2 * num_kv_heads, head_dim)), dtype)
    pages = jnp.asarray(rng.normal(size=(2, 9, num_kv_heads, PAGE_SIZE, head_dim)), dtype)
    place = np.arange(num_tokens)
    where = {"pages": jnp.asarray(1 + place // PAGE_SIZE, jnp.int32), "offsets": jnp.asarray(place % PAGE_SIZE)}
    rotary = rope.rotary_tables(jnp.asarray(place + 3), 0.7 ** np.arange(num_pairs), 1.0) if num_pairs else None
    return heads, LayerCache(pages[0], pages[1]), where, rotary


def step_by_step(heads, cache, where, rotary, norm):
    num_kv_heads = cache.keys.shape[1]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    queries, keys, values = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if norm is not None:
        queries, keys = normed(queries, norm.query_weight, norm), normed(keys, norm.key_weight, norm)
    if rotary is not None:
        queries, keys = rope.rotate(queries, rotary), rope.rotate(keys, rotary)
    written = kv_cache.write(cache, keys, values, **where)
    return queries, written.keys, written.values


def normed(x, weight, norm):
    wide = np.asarray(x, np.float64)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + norm.eps) * (np.asarray(weight, np.float64) + norm.offset)
    return jnp.asarray(wide, x.dtype)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "num_pairs", "offset", "dtype"),
    [
        pytest.param(1, 4, 2, 16, 8, None, "float32", marks=pytest.mark.matrix),
        (5, 4, 2, 20, 10, 0.0, "float32"),
        (40, 2, 1, 12, 4, 1.0, "float32"),  # a part of each head is rotated
        (3, 2, 2, 16, 0, None, "float32"),  # nothing is
        pytest.param(5, 4, 2, 16, 8, 0.0, "bfloat16", marks=pytest.mark.matrix),
        (17, 4, 2, 16, 8, 1.0, "bfloat16"),
    ],
)
def test_rotate_and_write_equals_the_layers(num_tokens, num_heads, num_kv_heads, head_dim, num_pairs, offset, dtype):
    heads, cache, where, rotary = make_case(num_tokens, num_heads, num_kv_heads, head_dim, num_pairs, dtype)
    weights = 1 + 0.1 * np.random.default_rng(1).normal(size=(2, head_dim))
    norm = None if offset is None else HeadNorm(*(jnp.asarray(weight, dtype) for weight in weights), EPS, offset)

    def call(heads, keys, values):
        return rotate_and_write(heads, keys, values, rotary=rotary, norm=norm, **where)

    found = jax.jit(call)(heads, cache.keys, cache.values)
    # In bfloat16 the layers round after every product, the kernel at the end.
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == "float32" else {"rtol": 2**-6, "atol": 2**-5}
    for ours, theirs in zip(found, step_by_step(heads, cache, where, rotary, norm), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), **tolerance)


def test_rotate_and_write_leaves_other_places_as_they_are():
    heads, cache, where, rotary = make_case(5, 4, 2, 16, 8, "float32")
    _, keys, values = rotate_and_write(heads, cache.keys, cache.values, rotary=rotary, norm=None, **where)
    for before, after in ((cache.keys, keys), (cache.values, values)):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=(1, 3))
        assert changed.sum() == 5 and changed[1, :5].all()


def test_rotate_and_write_lowers_for_gpu_as_one_kernel():
    heads, cache, where, rotary = make_case(5, 4, 2, 96, 48, "bfloat16")
    weight = jnp.ones(96, jnp.bfloat16)

    def call(heads, keys, values):
        norm = HeadNorm(weight, weight, EPS, 0.0)
        return rotate_and_write(heads, keys, values, rotary=rotary, norm=norm, **where)

    assert count_kernels(lowered_for_gpu(call, heads, cache.keys, cache.values)) == 1
