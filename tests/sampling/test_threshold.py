"""The search for a threshold against sorted copies, on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sampling_tools import MEDIUM, on_mesh

from jaxinfer.communication.mesh import make_mesh
from jaxinfer.sampling.threshold import largest_threshold, smallest_bound


def largest_threshold_of_count(z, floor, target, *, backend):
    return largest_threshold(z, floor=floor, target=target, by_mass=False, backend=backend)


def test_smallest_bound_random_keys_equal_reference():
    rng = np.random.default_rng(16)
    keys = rng.integers(0, 2**32, (8, MEDIUM), dtype=np.uint32) >> rng.integers(0, 30, (8, 1), dtype=np.uint32)
    weights = rng.integers(0, 5, (8, MEDIUM)).astype(np.float32)  # whole numbers, so that sums are exact
    target = (weights.sum(axis=1) * [0, 0.001, 0.2, 0.5, 0.9, 1, 1, 1.01]).astype(np.float32)
    expected = []
    for row, weight, enough in zip(keys, weights, target, strict=True):
        order = np.argsort(row)
        reached = np.cumsum(weight[order]) >= enough
        expected.append(row[order][reached][0] if reached.any() else 2**32 - 1)
    expected[0] = 0  # nothing is needed
    call = jax.shard_map(smallest_bound, mesh=make_mesh(), in_specs=P(), out_specs=P(), check_vma=False)
    np.testing.assert_array_equal(jax.jit(call)(keys, weights, target), expected)


@pytest.mark.parametrize(
    ("backend", "num_shards"), [("xla", 1), pytest.param("pallas", 1, marks=pytest.mark.matrix), ("pallas", 2)]
)
def test_largest_threshold_counts_up_to_the_vocabulary_and_no_further(backend, num_shards):
    """The first digit of a depth has three bits, the others four: depths of every size are looked for."""
    rng = np.random.default_rng(20)
    z = -np.abs(rng.normal(size=(40, MEDIUM)) * 10.0 ** rng.integers(-38, 38, (40, MEDIUM))).astype(np.float32)
    z[:, 17], z[::3, 100:] = 0, -np.inf
    count = rng.integers(1, MEDIUM + 1, 40)
    count[:4] = [1, MEDIUM, MEDIUM + 1, 10**6]
    search = on_mesh(largest_threshold_of_count, mesh=make_mesh(tensor_parallel_size=num_shards), backend=backend)
    found = search(jnp.asarray(z), jnp.full(40, -jnp.inf), jnp.asarray(count, jnp.float32))
    order = -np.sort(-z, axis=1)
    expected = [row[number - 1] if number <= MEDIUM else -np.inf for row, number in zip(order, count, strict=True)]
    np.testing.assert_array_equal(found, expected)
