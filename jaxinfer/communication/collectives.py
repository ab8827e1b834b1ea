"""The collectives of one step, by what they mean. All run inside a shard_map over ("pipe", "tensor").

Owns: which mesh axis each exchange uses. A vocabulary is sharded over the whole mesh, pipe-major.
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

# XLA's CPU backend keeps a collective over one device in the program; hence the tests of the size. The names are found
# again in traced and compiled programs.


@jax.named_scope("sum_over_tensor")
def sum_over_tensor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Adds the partial results of a row-parallel product over the shards of a stage."""
    return x if lax.axis_size(TENSOR) == 1 else lax.psum(x, TENSOR)


@jax.named_scope("sum_over_vocabulary")
def sum_over_vocabulary(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Adds the shares of all vocabulary slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.psum(x, VOCABULARY)


@jax.named_scope("max_over_vocabulary")
def max_over_vocabulary(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The largest over all vocabulary slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.pmax(x, VOCABULARY)


@jax.named_scope("min_over_vocabulary")
def min_over_vocabulary(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The smallest over all vocabulary slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.pmin(x, VOCABULARY)


def num_vocabulary_shards() -> int:
    """Devices over which a vocabulary is spread."""
    return lax.axis_size(VOCABULARY)


def vocabulary_shard() -> Int[Array, ""]:
    """Index of this device's vocabulary slice."""
    return lax.axis_index(VOCABULARY)


def tensor_shard() -> Int[Array, ""]:
    """Index of this device among the shards of its stage."""
    return lax.axis_index(TENSOR)


@jax.named_scope("gather_candidates")
def gather_candidates(x: Shaped[Array, "R K"]) -> Shaped[Array, "R J"]:
    """Every slice's K candidates of each row side by side, in the order of the slices."""
    return x if lax.axis_size(VOCABULARY) == 1 else lax.all_gather(x, VOCABULARY, axis=1, tiled=True)


@jax.named_scope("share_from_last_stage")
def share_from_last_stage(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gives every stage what the last one holds."""
    last = lax.axis_size(PIPE) - 1
    if last == 0:
        return x
    return lax.psum(jnp.where(lax.axis_index(PIPE) == last, x, jnp.zeros_like(x)), PIPE)


@jax.named_scope("send_to_next_stage")
def send_to_next_stage(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gives every stage what the one before it holds; the first one gets zeros."""
    last = lax.axis_size(PIPE) - 1
    return lax.ppermute(x, PIPE, [(stage, stage + 1) for stage in range(last)])


def num_stages() -> int:
    """Pipeline stages."""
    return lax.axis_size(PIPE)


def num_shards() -> int:
    """Tensor shards of a stage."""
    return lax.axis_size(TENSOR)


def stage_index() -> Int[Array, ""]:
    """Index of this device's pipeline stage."""
    return lax.axis_index(PIPE)


def stage_value(values: Sequence[int]) -> int | Int[Array, ""]:
    """This stage's entry of one number a stage; a plain number where all are equal."""
    return values[0] if len(set(values)) == 1 else jnp.asarray(values, jnp.int32)[stage_index()]
