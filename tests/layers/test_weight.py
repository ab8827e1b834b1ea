"""Int8 matrices: rounding against numpy, and products against the matrix that the integers stand for."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.communication.mesh import make_mesh
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.linear import project
from jaxinfer.layers.weight import dequantize, quantize


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix(num_out: int, num_in: int) -> tuple[jax.Array, jax.Array]:
    """Int8 values and scales of a random matrix, one of whose rows is zero."""
    weight = normal(num_out, num_in) / num_in**0.5
    weight[1] = 0
    return quantize(jnp.asarray(weight))


def test_quantize_rounds_as_numpy_and_reaches_127():
    weight = normal(2, 5, 40)
    weight[1, 3] = 0
    values, scale = jax.jit(quantize)(jnp.asarray(weight))
    largest = np.abs(weight).max(-1)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    steps = weight / np.where(largest == 0, 1, largest / 127)[..., None]
    assert np.abs(np.asarray(values) - steps).max() <= 0.5 + 1e-4  # the nearest integer, but for the last bits
    assert (np.abs(values).max(-1) == np.where(largest == 0, 0, 127)).all()
    again, same = quantize(dequantize(values, scale, jnp.dtype("float32")))
    np.testing.assert_array_equal(again, values)
    np.testing.assert_allclose(same, scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(1, 64, 8), (2, 300, 31), (33, 1536, 40)])
def test_project_int8_equals_product_with_what_it_stands_for(num_rows, num_in, num_out, dtype):
    x = jnp.asarray(normal(num_rows, num_in, seed=1), dtype)
    values, scale = matrix(num_out, num_in)
    y = jax.jit(lambda x: project(x, values, scale, out_dtype=jnp.dtype("float32")))(x)
    assert y.dtype == jnp.float32
    weight = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None]
    inputs = np.asarray(x, np.float64)
    # Rounding to 16 bits moves an input by at most 1 / 65,024 of its row's largest.
    bound = np.abs(inputs).max(1, keepdims=True) / 65024 * np.abs(weight).sum(1) + 1e-5
    assert (np.abs(y - inputs @ weight.T) <= bound).all()
    assert project(x, values, scale).dtype == dtype


def test_project_int8_row_is_the_same_among_any_others():
    """Sums of integers are exact: no bit depends on company, unlike in float32."""
    x, (values, scale) = jnp.asarray(normal(9, 300, seed=1)), matrix(31, 300)
    call = jax.jit(project)
    many = np.asarray(call(x, values, scale))
    for i in range(9):
        np.testing.assert_array_equal(call(x[i : i + 1], values, scale)[0], many[i])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_project_int8_nan_stays_with_its_row(bad):
    x, (values, scale) = normal(3, 64, seed=1), matrix(8, 64)
    x[1, 5] = bad
    x[2] = 0
    y = np.asarray(project(jnp.asarray(x), values, scale))
    assert np.isfinite(y[[0, 2]]).all() and not y[2].any()
    assert not np.isfinite(y[1]).any(where=np.asarray(scale) > 0) and np.isnan(y[1]).any()


@pytest.mark.parametrize("size", [1e-36, 1e30])
def test_project_int8_of_tiny_and_huge_rows_equals_numpy(size):
    x, (values, scale) = normal(2, 64, seed=1) * np.float32(size), matrix(8, 64)
    expected = x.astype(np.float64) @ np.asarray(dequantize(values, scale, jnp.dtype("float32")), np.float64).T
    found = np.asarray(project(jnp.asarray(x), values, scale), np.float64)
    # A step of the smaller rows is no normal float32, and XLA takes it for zero; they must not become infinite.
    np.testing.assert_allclose(found, expected, atol=1e-3 * size if size > 1 else 1e-34)


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_project_int8_makes_no_copy_of_the_matrix(num_rows):
    values, scale = matrix(960, 576)
    compiled = jax.jit(project).lower(jnp.ones((num_rows, 576)), values, scale).compile()
    copies = re.findall(r"= (\w+)\[(?:960,576|576,960)\]\S* (?!parameter)", compiled.as_text())
    assert not copies


def test_embedding_int8_looks_up_and_scores_what_it_stands_for():
    table = VocabularyEmbedding(10, 32, num_shards=1, dtype=jnp.dtype("float32"), quantization="int8")
    table.weight[...], table.weight_scale[...] = matrix(10, 32)
    stands_for = np.asarray(dequantize(table.weight[...], table.weight_scale[...], jnp.dtype("float32")))
    ids, x = jnp.array([3, 1, 9]), jnp.asarray(normal(2, 32, seed=1))
    with jax.set_mesh(make_mesh()):
        call = jax.shard_map(
            lambda ids, x: (table.embed(ids), table.logits(x)),
            in_specs=jax.sharding.PartitionSpec(),
            out_specs=jax.sharding.PartitionSpec(),
            check_vma=False,
        )
        rows, logits = jax.jit(call)(ids, x)
    np.testing.assert_array_equal(rows, stands_for[[3, 1, 9]])
    np.testing.assert_allclose(logits, np.asarray(x) @ stands_for.T, atol=1e-3)
