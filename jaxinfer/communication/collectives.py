"""The collectives of one step, each named by its purpose. All run inside a shard_map over ("pipe", "tensor").

Owns: which mesh axes each collective uses. The vocabulary is sharded over the whole mesh: slice s * tp + t lies on
tensor shard t of pipeline stage s.
Does not know: models, sampling rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxinfer.communication.mesh import PIPE, TENSOR

VOCABULARY = (PIPE, TENSOR)

# XLA's CPU backend does not remove a collective over a single device, so the functions test the size themselves.
# The names of the scopes appear in traced programs, where communication/volume.py finds them, and in compiled ones.


@jax.named_scope("sum_over_tensor")
def sum_over_tensor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sums the partial results of a row-parallel product over the tensor shards of a stage."""
    return x if lax.axis_size(TENSOR) == 1 else lax.psum(x, TENSOR)


@jax.named_scope("sum_over_vocabulary")
def sum_over_vocabulary(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Sums what every device computed for its slice of the vocabulary, over the whole mesh."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.psum(x, VOCABULARY)


@jax.named_scope("max_over_vocabulary")
def max_over_vocabulary(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The elementwise maximum over all vocabulary slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.pmax(x, VOCABULARY)


@jax.named_scope("min_over_vocabulary")
def min_over_vocabulary(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The elementwise minimum over all vocabulary slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.pmin(x, VOCABULARY)


def num_vocabulary_shards() -> int:
    """The number of vocabulary slices, one on every device of the mesh."""
    return lax.axis_size(VOCABULARY)


def vocabulary_shard() -> Int[Array, ""]:
    """Index of this device's vocabulary slice."""
    return lax.axis_index(VOCABULARY)


def tensor_shard() -> Int[Array, ""]:
    """Index of this device among the shards of its stage."""
    return lax.axis_index(TENSOR)


@jax.named_scope("gather_shards")
def gather_shards(x: Shaped[Array, "T P ..."]) -> Shaped[Array, "T W ..."]:
    """Concatenates the parts of all tensor shards along axis 1, in their order."""
    return x if lax.axis_size(TENSOR) == 1 else lax.all_gather(x, TENSOR, axis=1, tiled=True)


@jax.named_scope("gather_candidates")
def gather_candidates(x: Shaped[Array, "R K"]) -> Shaped[Array, "R J"]:
    """Concatenates the K candidates per row of all vocabulary slices along axis 1, in the order of the slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.all_gather(x, VOCABULARY, axis=1, tiled=True)


@jax.named_scope("share_from_last_stage")
def share_from_last_stage(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gives every stage the last stage's x."""
    last = lax.axis_size(PIPE) - 1
    if last == 0:
        return x
    return lax.psum(jnp.where(lax.axis_index(PIPE) == last, x, jnp.zeros_like(x)), PIPE)


@jax.named_scope("send_to_next_stage")
def send_to_next_stage(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gives every stage the x of the stage before it; the first stage gets zeros."""
    last = lax.axis_size(PIPE) - 1
    return lax.ppermute(x, PIPE, [(stage, stage + 1) for stage in range(last)])


def num_stages() -> int:
    """The number of pipeline stages."""
    return lax.axis_size(PIPE)


def num_shards() -> int:
    """The number of tensor shards of a stage."""
    return lax.axis_size(TENSOR)


def stage_index() -> Int[Array, ""]:
    """Index of this device's pipeline stage."""
    return lax.axis_index(PIPE)


def stage_value(values: Sequence[int]) -> int | Int[Array, ""]:
    """This stage's entry of `values`, which has one number per stage; a Python int if all entries are equal."""
    return values[0] if len(set(values)) == 1 else jnp.asarray(values, jnp.int32)[stage_index()]
