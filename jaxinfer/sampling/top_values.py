"""The largest values of each row, from all slices of the vocabulary.

Owns: how a slice's largest values are found, and how those of all slices are brought together.
Does not know: what they are needed for.
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import gather_candidates, num_vocabulary_shards, vocabulary_shard
from jaxinfer.kernels.pallas_sampling import best_first

_GROUP = 128
_GROUPS = (_GROUP, 16, 1)
"""Sizes of the groups by which _top_by_counting narrows a slice down. With 128 thousand logits and 65 candidates, each
of its steps ranks about a thousand values, few enough to compare each of them with each."""


def top_values(x: Float[Array, "R V"], count: int, *, backend: str) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The `count` largest values of this slice with their global ids, best first, the lowest id first on ties.

    These values all lie in the `count` groups of 128 that have the largest maxima, so only those groups are searched.
    The search uses lax.top_k, which on GPUs is a sort in dozens of kernels for more than 16 values; the "pallas"
    backend ranks values by comparing each with each instead.
    """
    by_counting = backend == "pallas" and count <= _GROUP
    values, ids = (_top_by_counting if by_counting else _top_by_sorting)(x, count=count)
    return values, ids + vocabulary_shard() * x.shape[1]


def _in_groups(x: Float[Array, "R V"], size: int) -> Float[Array, "R G C"]:
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=-jnp.inf)
    return padded.reshape(x.shape[0], -1, size)


def _top_by_sorting(x: Float[Array, "R V"], *, count: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """Finds the groups with the largest maxima by one lax.top_k, and the largest of their members by another."""
    if x.shape[1] <= count * _GROUP:
        values, ids = lax.top_k(x, count)
        return values, ids
    grouped = _in_groups(x, _GROUP)
    _, groups = lax.top_k(jnp.max(grouped, axis=-1), count)
    groups = jnp.sort(groups, axis=-1)  # ascending ids, so that ties keep the lowest
    members = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(x.shape[0], -1)
    values, where = lax.top_k(members, count)
    return values, jnp.take_along_axis(groups, where // _GROUP, axis=1) * _GROUP + where % _GROUP


def _top_by_counting(x: Float[Array, "R V"], *, count: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """Finds the groups of 128 with the largest maxima, then the best groups of 16 in those, then the best values."""
    sizes = [size for size in _GROUPS if size == 1 or size * count < x.shape[1]]
    values, groups = jnp.max(_in_groups(x, sizes[0]), axis=-1, keepdims=True), None
    for size, smaller in pairwise(sizes):
        _, groups = best_first(values, groups, count=count)
        members = jnp.take_along_axis(_in_groups(x, size), groups[:, :, None], axis=1)
        values = jnp.max(members.reshape(len(x), count, -1, smaller), axis=-1)
    return best_first(values, groups, count=count)


def gathered(
    values: Float[Array, "R K"], token_ids: Int[Array, "R K"], *, backend: str
) -> tuple[Float[Array, "R J"], Int[Array, "R J"]]:
    """Gathers the candidates of all slices: values and ids, best first, the lowest id first on ties."""
    if num_vocabulary_shards() == 1:  # the candidates of one slice are in this order already
        return values, token_ids
    rows, count = values.shape
    # Values and ids travel in one gather, since the cost of a small gather is its latency.
    packed = jnp.concatenate([lax.bitcast_convert_type(values, jnp.int32), token_ids], axis=1)
    packed = gather_candidates(packed).reshape(rows, -1, 2, count)
    values = lax.bitcast_convert_type(packed[:, :, 0], jnp.float32).reshape(rows, -1)
    token_ids = packed[:, :, 1].reshape(rows, -1)
    if backend == "pallas":
        return best_first(values[:, :, None], token_ids, count=values.shape[1])
    negated, token_ids = lax.sort((-values, token_ids), dimension=1, num_keys=2)
    return -negated, token_ids
