"""Products in full precision whatever path they take, and the column- and row-parallel pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfer.communication.mesh import make_mesh
from jaxinfer.layers.linear import (
    ColumnParallelLinear,
    FusedPart,
    RowParallelLinear,
    project,
)
from jaxinfer.layers.residual import PendingSum, total


def normal(*shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_size", [6, 7])
@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_project_any_path_equals_plain_product(
    num_rows: int, out_size: int, dtype: str, out_dtype: str | None, inputs_first: bool
) -> None:
    x, weight = normal(num_rows, 32, dtype=dtype), normal(out_size, 32, dtype=dtype)
    kept = weight.T if inputs_first else weight
    options = {"inputs_first": inputs_first, "out_dtype": out_dtype and jnp.dtype(out_dtype)}
    y = jax.jit(lambda x, w: project(x, w, **options))(x, kept)
    assert y.shape == (num_rows, out_size) and y.dtype == (out_dtype or dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # 32 terms in float32; a bfloat16 result is rounded once to 8 bits.
    tolerance = 1e-5 if y.dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=1e-5)


def test_project_one_row_equals_that_row_of_many() -> None:
    x, weight = normal(9, 32), normal(6, 32)
    many = project(x, weight)
    for i in range(9):
        np.testing.assert_allclose(project(x[i : i + 1], weight)[0], many[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_column_then_row_parallel_equals_two_products(num_rows: int, bias: bool) -> None:
    parts = (FusedPart(6), FusedPart(4))
    options = {"num_stages": 1, "dtype": jnp.dtype("float32"), "bias": bias}
    column, row = ColumnParallelLinear(8, parts, **options), RowParallelLinear(10, 8, **options)
    column.weight[...], row.weight[...] = normal(1, 10, 8), normal(1, 8, 10)
    expected = x = normal(num_rows, 8)
    for layer in (column, row):
        expected = expected @ layer.weight[0].T
        if bias:
            layer.bias[...] = normal(*layer.bias.shape)
            expected = expected + layer.bias[0]
        assert (layer.bias is not None) == bias
    everywhere = PartitionSpec()
    pair = jax.shard_map(lambda x: row(column(x)), mesh=make_mesh(), in_specs=everywhere, out_specs=everywhere)
    np.testing.assert_allclose(jax.jit(pair)(x), expected, rtol=1e-4, atol=1e-5)
    assert column.weight.get_metadata()["parts"] == parts


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 5, 70])
def test_row_parallel_with_gpu_kernels_leaves_few_rows_to_the_next_norm(num_rows: int, num_shards: int) -> None:
    """The addition waits where one kernel can do it with the norm: after a psum, and of few rows."""
    layer = RowParallelLinear(512, 8, num_stages=1, dtype=jnp.dtype("float32"), backend="pallas")
    layer.weight[...] = weight = normal(1, 8, 512)
    structure, parameters = nnx.split(layer)
    x, residual = normal(num_rows, 512), normal(num_rows, 8)
    waits = []

    def run(x: jax.Array, parameters: nnx.State, residual: jax.Array) -> jax.Array:
        stream = nnx.merge(structure, parameters)(x, residual=residual)
        waits.append(isinstance(stream, PendingSum))
        return total(stream)

    mesh = make_mesh(tensor_parallel_size=num_shards)
    features = PartitionSpec(None, "tensor")
    specs = (features, PartitionSpec(None, None, "tensor"), PartitionSpec())
    call = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    expected = residual + np.asarray(x, np.float64) @ np.asarray(weight[0], np.float64).T
    np.testing.assert_allclose(jax.jit(call)(x, parameters, residual), expected, rtol=1e-4, atol=1e-4)
    assert waits[-1] == (num_rows > 1 if num_shards > 1 else num_rows == 5)
