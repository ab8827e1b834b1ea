"""The ready-made interventions against numpy, and what captures show of them in a running model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.taps import InterventionContext
from jaxinfer.research import ablate, add, clamp_feature, patch, project_out, scale

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((4, 6)).astype(np.float32)
CONTEXT = InterventionContext(position=jnp.int32(3), prompt_len=jnp.int32(5), layer=jnp.int32(1))


def applied(intervention, x, **parameters):
    bound = intervention.at("layers.0.residual", **parameters)
    arrays = {name: jnp.asarray(value) for name, value in {**bound.parameters, **intervention.constants}.items()}
    return np.asarray(jax.jit(intervention.function)(jnp.asarray(x), CONTEXT, **arrays))


def test_add_vector_and_scale():
    np.testing.assert_allclose(applied(add, X, vector=X[::-1], scale=2.0), X + 2 * X[::-1], rtol=1e-6)
    np.testing.assert_allclose(applied(add, X[0], vector=X[1]), X[0] + X[1], rtol=1e-6)


@pytest.mark.parametrize("factor", [0.5, RANDOM.standard_normal(4)])
def test_scale_number_or_one_each(factor):
    np.testing.assert_allclose(applied(scale, X, factor=factor), X * np.reshape(factor, (-1, 1)), rtol=1e-6)


@pytest.mark.parametrize("index", [2, [0, 3], [-1, 9]])
@pytest.mark.parametrize("value", [None, 1.5, X[::-1]])
def test_ablate_only_chosen_entries_change(index, value):
    expected = X.copy()
    for i in np.atleast_1d(index):
        if 0 <= i < 4:
            expected[i] = 0.0 if value is None else np.broadcast_to(value, X.shape)[i]
    given = {} if value is None else {"value": value}
    np.testing.assert_array_equal(applied(ablate, X, index=index, **given), expected)


def test_project_out_leaves_nothing_along_the_direction():
    direction = 7 * RANDOM.standard_normal(6)
    found = applied(project_out, X, direction=direction)
    np.testing.assert_allclose(found @ direction, 0, atol=1e-5)
    unit = direction / np.linalg.norm(direction)
    np.testing.assert_allclose(found, X - np.outer(X @ unit, unit), atol=1e-6)
    np.testing.assert_array_equal(applied(project_out, X, direction=np.zeros(6)), X)


def test_patch_masked():
    np.testing.assert_array_equal(applied(patch, X, source=X + 1), X + 1)
    np.testing.assert_array_equal(applied(patch, X, source=X + 1, mask=False), X)


def test_clamp_feature_sets_its_activation_and_keeps_the_rest():
    encoder, _ = np.linalg.qr(RANDOM.standard_normal((6, 6)))
    encoder = encoder.astype(np.float32)  # of an orthogonal dictionary, features do not disturb one another
    weights = {"encoder": encoder, "encoder_bias": np.zeros(6, np.float32), "decoder": encoder.T}
    found = applied(clamp_feature.with_constants(**weights), X[0], feature=2, value=3.0)
    before, after = X[0] @ encoder, found @ encoder
    assert after[2] == pytest.approx(3.0 + min(before[2], 0.0), abs=1e-5)
    np.testing.assert_allclose(np.delete(after, 2), np.delete(before, 2), atol=1e-5)
