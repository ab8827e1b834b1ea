"""The circular pipeline, per shard: the batches on their way through the stages.

Owns: what is kept of every batch in flight, and the ring on which activations travel from stage to stage.
Does not know: models, programs.

A launch is one tick. A batch enters the first stage, every batch in flight moves on by one stage, and the one that
leaves the last stage is sampled; no stage waits for another. What a stage has to know of a batch (its rows' positions
and pages) follows from the state at the moment the batch entered. Every device works that out for itself and keeps it
for as long as the batch is in flight, so that nothing but activations has to travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.communication import collectives
from jaxinfer.communication.sharding import PER_STAGE, REPLICATED
from jaxinfer.wrappers.step_batch import PREFILL_BLOCK, SAMPLING_FIELDS, StepShape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentRows:
    """The rows of one segment; *S stands for batches in flight.

    Args:
      slot: int32[R], whose the row is.
      start: int32[R], position of a row's first query.
      q_len: int32[R], live queries; 0 for padding.
      page_table: int32[R, W].
    """

    slot: Int[Array, "*S R"]
    start: Int[Array, "*S R"]
    q_len: Int[Array, "*S R"]
    page_table: Int[Array, "*S R W"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitRows:
    """The tokens of a batch whose hidden states go to the head.

    Args:
      index: int32[M], which tokens, as StepBatch.logit_index.
      position: int32[M], in its text, of the token sampled from each.
      sampling: int32[M, SAMPLING_FIELDS], what each asks for.
      slot: int32[M], whose they are.
      feeds: int32[M], 1 where the sampled token becomes its slot's last token.
    """

    index: Int[Array, "*S M"]
    position: Int[Array, "*S M"]
    sampling: Int[Array, "*S M F"]
    slot: Int[Array, "*S M"]
    feeds: Int[Array, "*S M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Flight:
    """All that is known of a batch once it has entered."""

    decode: SegmentRows
    prefill: SegmentRows
    logits: LogitRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """The batches in flight, in buffers of one size for all programs; a step uses their beginnings.

    Args:
      tick: int32[], launches so far, modulo the stages.
      flights: arrays with a leading axis of stages; the batch of tick t lies at t.
      decode, prefill: [rows, D] and [rows * PREFILL_BLOCK, D], activations that this stage has received.
    """

    tick: Int[Array, ""]
    flights: Flight
    decode: Float[Array, "R D"]
    prefill: Float[Array, "T D"]

    @property
    def largest(self) -> StepShape:
        """The shape of the buffers."""
        return StepShape(
            num_decode=self.flights.decode.start.shape[1],
            num_prefill=self.flights.prefill.start.shape[1],
            num_logits=self.flights.logits.index.shape[1],
        )


def idle(largest: StepShape, *, num_stages: int, hidden_size: int, dtype: jnp.dtype, table_width: int) -> Ring | None:
    """A ring with idle batches in flight, all zeros; None for one stage, where nothing is ever on its way."""
    if num_stages == 1:
        return None

    def zeros(*dims: int) -> Array:
        return jnp.zeros((num_stages, *dims), jnp.int32)

    def rows(count: int) -> SegmentRows:
        return SegmentRows(zeros(count), zeros(count), zeros(count), zeros(count, table_width))

    def activations(num_tokens: int) -> Array:
        return jnp.zeros((num_stages * num_tokens, hidden_size), dtype)

    count = largest.num_logits
    logits = LogitRows(zeros(count), zeros(count), zeros(count, SAMPLING_FIELDS), zeros(count), zeros(count))
    return Ring(
        tick=jnp.zeros((), jnp.int32),
        flights=Flight(decode=rows(largest.num_decode), prefill=rows(largest.num_prefill), logits=logits),
        decode=activations(largest.num_decode),
        prefill=activations(largest.num_prefill * PREFILL_BLOCK),
    )


def specs(num_leaves: int) -> list[PartitionSpec]:
    """How the leaves of a ring lie on the mesh: the activations, which come last, by stage."""
    return [REPLICATED] * (num_leaves - 2) + [PER_STAGE] * 2 if num_leaves else []


def enter(ring: Ring | None, flight: Flight, x: Float[Array, "T D"]) -> tuple[Ring | None, Flight, Float[Array, "T D"]]:
    """Lets a batch enter the pipeline.

    Args:
      ring: None with one stage.
      flight: the entering batch.
      x: its embedded tokens.

    Returns:
      The ring with the batch in it, the batch that this stage works on now, and that batch's activations.
    """
    if ring is None:
        return None, flight, x
    whole = _padded(flight, ring.largest)
    place = ring.tick
    flights = jax.tree.map(
        lambda kept, new: lax.dynamic_update_index_in_dim(kept, new, place, axis=0), ring.flights, whole
    )
    ring = Ring(ring.tick, flights, ring.decode, ring.prefill)
    num_decode = flight.decode.start.shape[0]
    received = jnp.concatenate([ring.decode[:num_decode], ring.prefill[: x.shape[0] - num_decode]])
    x = jnp.where(collectives.stage_index() == 0, x, received)
    return ring, _entered(ring, collectives.stage_index(), flight), x


def leave(ring: Ring | None, flight: Flight, x: Float[Array, "T D"]) -> tuple[Ring | None, LogitRows]:
    """Ends a tick.

    Args:
      ring: as enter returned it.
      flight: the batch that entered.
      x: the activations behind this stage's layers.

    Returns:
      The ring with every stage's activations at the next one, and the logit rows of the batch that leaves.
    """
    if ring is None:
        return None, flight.logits
    leaving = _entered(ring, collectives.num_stages() - 1, flight).logits
    num_decode = flight.decode.start.shape[0]
    sent = collectives.send_to_next_stage(x)
    decode = lax.dynamic_update_slice(ring.decode, sent[:num_decode], (0, 0))
    prefill = lax.dynamic_update_slice(ring.prefill, sent[num_decode:], (0, 0))
    return Ring((ring.tick + 1) % collectives.num_stages(), ring.flights, decode, prefill), leaving


def _padded(flight: Flight, largest: StepShape) -> Flight:
    """A batch with rows of padding, which are zeros, up to a shape."""

    def padded(part: SegmentRows | LogitRows, size: int) -> Any:
        return jax.tree.map(lambda x: jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)), part)

    return Flight(
        decode=padded(flight.decode, largest.num_decode),
        prefill=padded(flight.prefill, largest.num_prefill),
        logits=padded(flight.logits, largest.num_logits),
    )


def _entered(ring: Ring, age: int | Int[Array, ""], like: Flight) -> Flight:
    """The batch that entered `age` ticks ago, cut to the shape of another."""
    where = (ring.tick - age) % collectives.num_stages()

    def cut(kept: Array, like: Array) -> Array:
        return lax.dynamic_index_in_dim(kept, where, keepdims=False)[: like.shape[0]]

    return jax.tree.map(cut, ring.flights, like)
