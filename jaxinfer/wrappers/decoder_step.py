"""The forward half of a step, for one shard: from token ids to the hidden states that are sampled from.

Owns: what the model has to know of the tokens of a batch (positions, pages, rows), and which hidden states go on.
Does not know: how programs are compiled, how tokens are sampled, requests.

Forward and sample become separate programs, so that with 20 shapes and 4 samplers there are 24 programs to compile
instead of 80. A third program scores the tokens of prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import share_from_last_stage
from jaxinfer.interventions import HookTable
from jaxinfer.kernels.segment import Segment
from jaxinfer.layers.attention import TokenBatch
from jaxinfer.layers.kv_cache import DUMP_PAGE, LayerCache
from jaxinfer.layers.taps import SiteTaps, TapPlan, Taps
from jaxinfer.models.registry import Decoder
from jaxinfer.sites import EMBEDDING, FINAL_NORM
from jaxinfer.wrappers import pipeline
from jaxinfer.wrappers.decode_state import DecodeState, advanced, with_changes
from jaxinfer.wrappers.pipeline import Flight, LogitRows, Ring, SegmentRows
from jaxinfer.wrappers.step_inputs import StepInputs
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK


@dataclass(frozen=True, kw_only=True)
class LeavingBatch:
    """What the head has to know of the batch that leaves the last stage.

    Args:
      hidden: [M, D], normalised hidden states of the tokens after which one is sampled.
      rows: tells how to sample from them.
      prompts: [T, D], normalised hidden states of all prefill tokens; None unless the step is scored.
    """

    hidden: Float[Array, "M D"]
    rows: LogitRows
    prompts: Float[Array, "T D"] | None


@dataclass(frozen=True, kw_only=True)
class StepHooks:
    """What the taps of a step need, for one shard.

    Args:
      plan: what happens at the sites.
      tables: the parameters of its hooks.
      rows: int32[J, R + P], for each of its hooks the row of each decode and prefill row in the hook's table.
    """

    plan: TapPlan
    tables: list[HookTable]
    rows: Int[Array, "J N"]

    def taps(self, shape: StepInputs, positions: Int[Array, " T"]) -> Taps:
        """The taps of all tokens of a step."""
        num_decode = shape.decode_slots.shape[0]
        of_prompts = jnp.repeat(self.rows[:, num_decode:], shape.row_len, axis=1)
        return Taps(self.plan, self.tables, jnp.concatenate([self.rows[:, :num_decode], of_prompts], axis=1), positions)


class DecoderStep(nnx.Module):
    """The model and the forward half of a step, for one shard.

    Args:
      model: an nnx module with the Decoder protocol.
      page_size: C in tokens.
      max_decode: rows of the largest decode segment; StepBatch.logit_index counts prefill tokens from this number on.
    """

    def __init__(self, model: Decoder, *, page_size: int, max_decode: int):
        self.model = model
        self.page_size = page_size
        self.max_decode = max_decode

    def __call__(
        self,
        state: DecodeState,
        caches: Sequence[LayerCache],
        ring: Ring | None,
        inputs: StepInputs,
        *,
        scored: bool = False,
        hooks: StepHooks | None = None,
    ) -> tuple[DecodeState, list[LayerCache], Ring | None, LeavingBatch, Taps | None]:
        """Runs one tick of the pipeline: a batch enters, and every batch in flight moves on by one stage.

        With one stage, the batch that enters is also the one that leaves.

        Returns:
          The new state, the written caches, the ring, the batch that leaves the last stage, and what the taps of the
          batch in this stage have found; None without hooks.
        """
        state = with_changes(state, inputs)
        flight = self._flight(state, inputs)
        state = advanced(state, inputs)
        positions = self._tokens(flight, inputs.row_len).positions
        token_ids = jnp.concatenate([state.last_token[inputs.decode_slots], inputs.prefill_tokens.ravel()])
        ring, here, x = pipeline.enter(ring, flight, self.model.embed(token_ids, positions))
        batch = self._tokens(here, inputs.row_len)
        found = None if hooks is None else hooks.taps(inputs, batch.positions)
        taps = SiteTaps(found)
        batch = batch if found is None else dataclasses.replace(batch, taps=taps)
        x, caches = self.model.run_layers(taps(EMBEDDING, x), caches, batch)
        if found is not None:
            found.check_end(x)
        ring, rows = pipeline.leave(ring, flight, x)
        is_normed = taps.touches(FINAL_NORM)
        x = taps(FINAL_NORM, self.model.final_norm(x)) if is_normed else x

        def for_head(x: Float[Array, "M D"]) -> Float[Array, "M D"]:
            shared = share_from_last_stage(x)
            return shared if is_normed else self.model.final_norm(shared)

        hidden = for_head(x[self._token_index(rows.index, inputs)])
        prompts = for_head(x[inputs.decode_slots.shape[0] :]) if scored else None
        return state, caches, ring, LeavingBatch(hidden=hidden, rows=rows, prompts=prompts), found

    def _flight(self, state: DecodeState, inputs: StepInputs) -> Flight:
        """What the stages and the sampler will have to know of the entering batch, read from the present state."""
        dump_slot = state.length.shape[0] - 1
        decode = SegmentRows(
            slot=inputs.decode_slots,
            start=state.length[inputs.decode_slots],
            q_len=(inputs.decode_slots != dump_slot).astype(jnp.int32),
            page_table=state.page_table[inputs.decode_slots],
        )
        prefill = SegmentRows(
            slot=inputs.prefill_slots,
            start=inputs.prefill_start,
            q_len=inputs.prefill_len,
            page_table=state.page_table[inputs.prefill_slots],
        )
        positions = jnp.concatenate([_positions(decode, 1).ravel(), _positions(prefill, inputs.row_len).ravel()])
        logits = LogitRows(
            index=inputs.logit_index,
            position=positions[self._token_index(inputs.logit_index, inputs)] + 1,
            sampling=state.sampling[inputs.logit_slots],
            slot=inputs.logit_slots,
            feeds=inputs.logit_feeds,
        )
        return Flight(decode=decode, prefill=prefill, logits=logits)

    def _token_index(self, index: Int[Array, " M"], inputs: StepInputs) -> Int[Array, " M"]:
        """Turns logit indices, as in StepBatch.logit_index, into indices among the tokens of the present shape."""
        row, place = jnp.divmod(index - self.max_decode, PREFILL_BLOCK)
        prefill = inputs.decode_slots.shape[0] + row * inputs.row_len + place
        return jnp.where(index < self.max_decode, index, prefill)

    def _tokens(self, flight: Flight, row_len: int) -> TokenBatch:
        """The tokens of both segments, one after the other, with their positions and their places in the KV cache."""
        positions, pages, segments = [], [], []
        for rows, num_queries in ((flight.decode, 1), (flight.prefill, row_len)):
            if rows.start.shape[0]:
                where = _positions(rows, num_queries)
                positions.append(where.ravel())
                pages.append(self._pages(rows, where))
                segments.append(
                    Segment(
                        page_table=rows.page_table,
                        kv_len=rows.start + rows.q_len,
                        q_len=rows.q_len,
                        sequence_id=rows.slot,
                        num_queries=num_queries,
                    )
                )
        all_positions = jnp.concatenate(positions)
        return TokenBatch(
            positions=all_positions,
            pages=jnp.concatenate(pages),
            offsets=all_positions % self.page_size,
            segments=tuple(segments),
        )

    def _pages(self, rows: SegmentRows, positions: Int[Array, "R Q"]) -> Int[Array, " T"]:
        """The page of every token, flat; padding tokens write to the dump page."""
        entry = jnp.minimum(positions // self.page_size, rows.page_table.shape[1] - 1)
        live = jnp.arange(positions.shape[1]) < rows.q_len[:, None]
        return jnp.where(live, jnp.take_along_axis(rows.page_table, entry, axis=1), DUMP_PAGE).ravel()


def _positions(rows: SegmentRows, num_queries: int) -> Int[Array, "R Q"]:
    return rows.start[:, None] + jnp.arange(num_queries, dtype=jnp.int32)
