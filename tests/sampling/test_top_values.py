"""The largest values of every backend and of several slices against a stable sort."""

import jax.numpy as jnp
import numpy as np
import pytest
from sampling_tools import BACKENDS, GROUPED, MEDIUM, on_mesh, random_logits

from jaxinfer.communication.mesh import make_mesh
from jaxinfer.sampling.sampling import NUM_CANDIDATES
from jaxinfer.sampling.top_values import gathered, top_values


@pytest.mark.parametrize("vocab_size", [100, MEDIUM, 3000, GROUPED])
@pytest.mark.parametrize(
    ("count", "backend"),
    [
        (20, "xla"),
        (NUM_CANDIDATES, "xla"),
        (NUM_CANDIDATES, "pallas"),
        pytest.param(20, "pallas", marks=pytest.mark.matrix),
    ],
)
def test_top_values_of_every_backend_equal_stable_order(vocab_size, count, backend):
    x = random_logits(np.random.default_rng(17), 6, vocab_size)
    x[2, 40:], x[3] = -np.inf, 1.0
    x += 0.0  # numpy's order does not tell -0.0 from 0.0
    order = np.argsort(-x, axis=1, kind="stable")[:, :count]
    values, ids = on_mesh(top_values, count=count, backend=backend)(jnp.asarray(x))
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_top_values_of_two_slices_equal_stable_order(backend):
    x = random_logits(np.random.default_rng(21), 6, MEDIUM)
    x += 0.0

    def best(x):
        return gathered(*top_values(x, 20, backend=backend), backend=backend)

    values, ids = on_mesh(best, mesh=make_mesh(tensor_parallel_size=2))(jnp.asarray(x))
    order = np.argsort(-x, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids[:, :20], order)
    np.testing.assert_array_equal(values[:, :20], np.take_along_axis(x, order, axis=1))
