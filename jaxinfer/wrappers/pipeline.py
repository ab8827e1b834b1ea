"""The circular pipeline, for one shard: the batches in flight on their way through the stages.

Owns: what is kept of every batch in flight, and the ring on which activations travel from stage to stage.
Does not know: models, programs.

Every launch is one tick. A batch enters the first stage, every batch in flight moves on by one stage, and the one that
leaves the last stage is sampled; no stage waits for another. What a stage has to know of a batch (the positions and
pages of its rows) follows from the decode state at the moment the batch enters. Every device computes that for itself
and keeps it while the batch is in flight, so that only activations have to be sent.
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
from jaxinfer.wrappers.step_batch import SAMPLING_FIELDS
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentRows:
    """The rows of one segment (decode or prefill) of a batch; *S is an axis of batches in flight, inside a Ring.

    Args:
      slot: int32[R], the slot of each row.
      start: int32[R], position of the row's first query.
      q_len: int32[R], the row's queries without padding; 0 for a padding row.
      page_table: int32[R, W], page ids.
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
      index: int32[M], which tokens, as in StepBatch.logit_index.
      position: int32[M], position that the sampled token will have in its text.
      sampling: int32[M, SAMPLING_FIELDS], sampling numbers of the row's slot.
      slot: int32[M], the slot of each row.
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
    """What is kept of a batch while it is in the pipeline."""

    decode: SegmentRows
    prefill: SegmentRows
    logits: LogitRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """The batches in flight.

    The buffers have the size of the largest step, so that all programs can share them; a smaller step uses the first
    rows of each.

    Args:
      tick: int32[], number of launches so far, modulo the number of stages.
      flights: a Flight whose arrays have a leading axis of stages; the batch that entered in tick t is entry t.
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
    """A ring of idle batches, all zeros; None with one stage, where no batch stays in flight between launches."""
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
    """How the leaves of a ring lie on the mesh: the last two, the activations, by stage, the others replicated."""
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
    """Ends a tick: sends every stage's activations to the next stage.

    Args:
      ring: the ring that enter returned.
      flight: the batch that entered.
      x: the activations after this stage's layers.

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
    """A batch padded with rows of zeros to the size of the ring's buffers."""

    def padded(part: SegmentRows | LogitRows, size: int) -> Any:
        return jax.tree.map(lambda x: jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)), part)

    return Flight(
        decode=padded(flight.decode, largest.num_decode),
        prefill=padded(flight.prefill, largest.num_prefill),
        logits=padded(flight.logits, largest.num_logits),
    )


def _entered(ring: Ring, age: int | Int[Array, ""], like: Flight) -> Flight:
    """The batch that entered `age` ticks ago, cut to the shape of another one (`like`)."""
    where = (ring.tick - age) % collectives.num_stages()

    def cut(kept: Array, like: Array) -> Array:
        return lax.dynamic_index_in_dim(kept, where, keepdims=False)[: like.shape[0]]

    return jax.tree.map(cut, ring.flights, like)
