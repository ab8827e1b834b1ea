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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import num_stages, send_to_next_stage, stage_index
from jaxinfer.communication.mesh import PIPE
from jaxinfer.communication.sharding import PER_STAGE, REPLICATED
from jaxinfer.wrappers.step_batch import PREFILL_BLOCK, SAMPLING_FIELDS, StepShape

NO_SLOT = 2**30
"""Out of bounds of any array over slots."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentRows:
    """The rows of one segment; *S stands for batches in flight.

    Args:
      start: int32[R], position of a row's first query.
      q_len: int32[R], live queries; 0 for padding.
      page_table: int32[R, W].
    """

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
      feed_slot: int32[M], the slot whose last token the sampled one becomes; NO_SLOT for none.
    """

    index: Int[Array, "*S M"]
    position: Int[Array, "*S M"]
    sampling: Int[Array, "*S M F"]
    feed_slot: Int[Array, "*S M"]


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
      tick: int32[], launches so far.
      flights: arrays with a leading axis of stages; the batch of tick t lies at t % stages.
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


def allocate(largest: StepShape, *, hidden_size: int, dtype: jnp.dtype, table_width: int, mesh: Mesh) -> Ring | None:
    """A ring with idle batches in flight; None for one stage, where nothing is ever on its way."""
    stages = mesh.shape[PIPE]
    if stages == 1:
        return None

    def full(*dims: int, value: int = 0) -> Array:
        return jax.device_put(np.full(dims, value, np.int32), NamedSharding(mesh, REPLICATED))

    def rows(count: int) -> SegmentRows:
        return SegmentRows(full(stages, count), full(stages, count), full(stages, count, table_width))

    def activations(num_tokens: int) -> Array:
        return jnp.zeros((stages * num_tokens, hidden_size), dtype, device=NamedSharding(mesh, PER_STAGE))

    count = largest.num_logits
    logits = LogitRows(
        index=full(stages, count),
        position=full(stages, count),
        sampling=full(stages, count, SAMPLING_FIELDS),
        feed_slot=full(stages, count, value=NO_SLOT),
    )
    return Ring(
        tick=full(),
        flights=Flight(decode=rows(largest.num_decode), prefill=rows(largest.num_prefill), logits=logits),
        decode=activations(largest.num_decode),
        prefill=activations(largest.num_prefill * PREFILL_BLOCK),
    )


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
    place = ring.tick % num_stages()
    flights = jax.tree.map(
        lambda kept, new: lax.dynamic_update_index_in_dim(kept, new, place, axis=0), ring.flights, whole
    )
    ring = Ring(ring.tick, flights, ring.decode, ring.prefill)
    num_decode = flight.decode.start.shape[0]
    received = jnp.concatenate([ring.decode[:num_decode], ring.prefill[: x.shape[0] - num_decode]])
    x = jnp.where(stage_index() == 0, x, received)
    return ring, _entered(ring, stage_index(), flight), x


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
    leaving = _entered(ring, num_stages() - 1, flight).logits
    num_decode = flight.decode.start.shape[0]
    sent = send_to_next_stage(x)
    decode = lax.dynamic_update_slice(ring.decode, sent[:num_decode], (0, 0))
    prefill = lax.dynamic_update_slice(ring.prefill, sent[num_decode:], (0, 0))
    return Ring(ring.tick + 1, ring.flights, decode, prefill), leaving


def _padded(flight: Flight, largest: StepShape) -> Flight:
    """A batch with rows of padding up to a shape."""

    def padded(x: Array, size: int, value: int = 0) -> Array:
        return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=value)

    logits = flight.logits
    return Flight(
        decode=jax.tree.map(lambda x: padded(x, largest.num_decode), flight.decode),
        prefill=jax.tree.map(lambda x: padded(x, largest.num_prefill), flight.prefill),
        logits=LogitRows(
            index=padded(logits.index, largest.num_logits),
            position=padded(logits.position, largest.num_logits),
            sampling=padded(logits.sampling, largest.num_logits),
            feed_slot=padded(logits.feed_slot, largest.num_logits, NO_SLOT),
        ),
    )


def _entered(ring: Ring, age: int | Int[Array, ""], like: Flight) -> Flight:
    """The batch that entered `age` ticks ago, cut to the shape of another."""
    where = (ring.tick - age) % num_stages()

    def cut(kept: Array, like: Array) -> Array:
        return lax.dynamic_index_in_dim(kept, where, keepdims=False)[: like.shape[0]]

    return jax.tree.map(cut, ring.flights, like)
