"""The device half of the decoder wrapper: one step of one shard.

Owns: the decode state by slot, the words of a step's upload, and the two halves of a step (forward, sample).
Does not know: compiled programs, numpy batches, requests.

A step is two programs, forward and sample, so that programs number shapes + samplers instead of shapes x samplers; a
third one scores the tokens of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import share_from_last_stage
from jaxinfer.layers.attention import Segment, TokenBatch
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.kv_cache import DUMP_PAGE, LayerCache
from jaxinfer.models.registry import Decoder
from jaxinfer.sampling import logit_edits, sampling
from jaxinfer.sampling.logit_edits import EditState
from jaxinfer.sampling.sampling import SamplingNumbers
from jaxinfer.wrappers import pipeline
from jaxinfer.wrappers.pipeline import Flight, LogitRows, Ring, SegmentRows
from jaxinfer.wrappers.step_batch import (
    PREFILL_BLOCK,
    SAMPLING_FIELDS,
    SamplerVariant,
    StepBatch,
    StepShape,
    StepShapes,
)

SCORE_BLOCK = 256
"""Rows of logits that exist at a time while prompts are scored."""
_SAMPLERS = {
    SamplerVariant.UNFILTERED: sampling.sample_unfiltered,
    SamplerVariant.CANDIDATES: sampling.sample_candidates,
    SamplerVariant.FULL: sampling.sample_full,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What the device keeps of every slot between steps; the last of the S + 1 slots is the dump slot.

    Args:
      last_token: int32[S + 1], the token whose key and value come next.
      length: int32[S + 1], positions with keys.
      page_table: int32[S + 1, W].
      sampling: int32[S + 1, SAMPLING_FIELDS].
    """

    last_token: Int[Array, " S"]
    length: Int[Array, " S"]
    page_table: Int[Array, "S W"]
    sampling: Int[Array, "S F"]

    @classmethod
    def zeros(cls, num_slots: int, table_width: int) -> DecodeState:
        """No slot in use."""
        rows = num_slots + 1
        return cls(
            last_token=jnp.zeros(rows, jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
            page_table=jnp.zeros((rows, table_width), jnp.int32),
            sampling=jnp.zeros((rows, SAMPLING_FIELDS), jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """The arrays of a StepBatch that the device reads; fields and shapes as there."""

    decode_slots: Int[Array, " R"]
    decode_page_index: Int[Array, " R"]
    decode_page_id: Int[Array, " R"]
    chunk_slots: Int[Array, " N"]
    chunk_pages: Int[Array, "N W"]
    chunk_sampling: Int[Array, "N F"]
    prefill_slots: Int[Array, " P"]
    prefill_start: Int[Array, " P"]
    prefill_len: Int[Array, " P"]
    prefill_tokens: Int[Array, "P Q"]
    logit_index: Int[Array, " M"]
    logit_slots: Int[Array, " M"]
    logit_feeds: Int[Array, " M"]

    @property
    def row_len(self) -> int:
        """Tokens of a prefill row."""
        return self.prefill_tokens.shape[1]


def _input_shapes(shape: StepShape, shapes: StepShapes) -> dict[str, tuple[tuple[int, ...], int]]:
    """Every input's dimensions, and the value of its padding."""
    rows, blocks, logits = (shape.num_decode,), (shape.num_prefill,), (shape.num_logits,)
    chunks = (shapes.num_chunks(shape),)
    width, dump_slot = shapes.table_width, shapes.num_slots
    return {
        "decode_slots": (rows, dump_slot),
        "decode_page_index": (rows, width),
        "decode_page_id": (rows, 0),
        "chunk_slots": (chunks, dump_slot),
        "chunk_pages": ((*chunks, width), 0),
        "chunk_sampling": ((*chunks, SAMPLING_FIELDS), 0),
        "prefill_slots": (blocks, dump_slot),
        "prefill_start": (blocks, 0),
        "prefill_len": (blocks, 0),
        "prefill_tokens": ((*blocks, shape.row_len), 0),
        "logit_index": (logits, 0),
        "logit_slots": (logits, dump_slot),
        "logit_feeds": (logits, 0),
    }


def num_input_words(shape: StepShape, shapes: StepShapes) -> int:
    """int32 words of a step's upload."""
    return sum(math.prod(dims) for dims, _ in _input_shapes(shape, shapes).values())


def pack_inputs(batch: StepBatch, shape: StepShape, shapes: StepShapes) -> np.ndarray:
    """A step's inputs, padded to a shape that holds them, as one int32 vector: one upload a step."""
    words, start = np.empty(num_input_words(shape, shapes), np.int32), 0
    for name, (dims, padding) in _input_shapes(shape, shapes).items():
        array = batch.prefill_tokens[:, : shape.row_len] if name == "prefill_tokens" else getattr(batch, name)
        size, array = math.prod(dims), array.ravel()
        words[start : start + array.size] = array
        words[start + array.size : start + size] = padding
        start += size
    return words


def unpack_inputs(words: Int[Array, " J"], shape: StepShape, shapes: StepShapes) -> StepInputs:
    """The inverse of pack_inputs, on the device."""
    arrays, start = {}, 0
    for name, (dims, _) in _input_shapes(shape, shapes).items():
        size = math.prod(dims)
        arrays[name] = words[start : start + size].reshape(dims)
        start += size
    return StepInputs(**arrays)


class DecoderStep(nnx.Module):
    """A model's parameters and the forward half of a step, per shard.

    Args:
      model: an nnx module with the Decoder protocol.
      page_size: C in tokens.
      max_decode: rows of the largest decode segment; logit indices count prefill tokens from there.
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
    ) -> tuple[DecodeState, list[LayerCache], Ring | None, Float[Array, "M D"], LogitRows, Float[Array, "T D"] | None]:
        """Takes a batch in and every batch in flight one stage on.

        Returns:
          The new state, the written caches, the ring, and of the batch that leaves the last stage the normalised hidden
          states [M, D] for the head, what to do with the tokens sampled from them, and where prompts are scored those
          of all prefill tokens.
        """
        state = _with_changes(state, inputs)
        flight = self._flight(state, inputs)
        state = _advanced(state, inputs)
        positions = self._tokens(flight, inputs.row_len).positions
        token_ids = jnp.concatenate([state.last_token[inputs.decode_slots], inputs.prefill_tokens.ravel()])
        ring, here, x = pipeline.enter(ring, flight, self.model.embed(token_ids, positions))
        x, caches = self.model.run_layers(x, caches, self._tokens(here, inputs.row_len))
        ring, logits = pipeline.leave(ring, flight, x)
        hidden = self._for_head(x[self._token_index(logits.index, inputs)])
        prompts = self._for_head(x[inputs.decode_slots.shape[0] :]) if scored else None
        return state, caches, ring, hidden, logits, prompts

    def _for_head(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.model.final_norm(share_from_last_stage(x))

    def _flight(self, state: DecodeState, inputs: StepInputs) -> Flight:
        """What the batch's stages and its sampler will need, from the state as it is now."""
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
        """Logit indices as positions among the tokens of a tick."""
        row, place = jnp.divmod(index - self.max_decode, PREFILL_BLOCK)
        prefill = inputs.decode_slots.shape[0] + row * inputs.row_len + place
        return jnp.where(index < self.max_decode, index, prefill)

    def _tokens(self, flight: Flight, row_len: int) -> TokenBatch:
        """Lays the tokens of both segments out flat, with positions and places in the cache."""
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
                        owner=rows.slot,
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
        """Page of every token, flat; the dump page beyond a row's live tokens."""
        entry = jnp.minimum(positions // self.page_size, rows.page_table.shape[1] - 1)
        live = jnp.arange(positions.shape[1]) < rows.q_len[:, None]
        return jnp.where(live, jnp.take_along_axis(rows.page_table, entry, axis=1), DUMP_PAGE).ravel()


def _positions(rows: SegmentRows, num_queries: int) -> Int[Array, "R Q"]:
    return rows.start[:, None] + jnp.arange(num_queries, dtype=jnp.int32)


def _with_changes(state: DecodeState, inputs: StepInputs) -> DecodeState:
    """The state with the step's new page table entries and sampling numbers."""
    page_table = state.page_table.at[inputs.chunk_slots].set(inputs.chunk_pages)
    # Index W, which padding and rows without a new page carry, is out of bounds and dropped.
    page_table = page_table.at[inputs.decode_slots, inputs.decode_page_index].set(inputs.decode_page_id, mode="drop")
    return DecodeState(
        last_token=state.last_token,
        length=state.length,
        page_table=page_table,
        sampling=state.sampling.at[inputs.chunk_slots].set(inputs.chunk_sampling),
    )


def _advanced(state: DecodeState, inputs: StepInputs) -> DecodeState:
    """The state with the lengths after the step; the dump slot's stays 0."""
    dump_slot = state.length.shape[0] - 1
    grown = state.length[inputs.decode_slots] + (inputs.decode_slots != dump_slot)
    length = state.length.at[inputs.decode_slots].set(grown)
    # A chunk's rows name one slot; its length is the last one's end, whatever the slot held before.
    length = length.at[inputs.prefill_slots].set(0)
    length = length.at[inputs.prefill_slots].max(inputs.prefill_start + inputs.prefill_len)
    return DecodeState(last_token=state.last_token, length=length, page_table=state.page_table, sampling=state.sampling)


def sample_step(
    head: VocabularyEmbedding,
    state: DecodeState,
    edits: EditState | None,
    hidden: Float[Array, "M D"],
    rows: LogitRows,
    *,
    variant: SamplerVariant,
    num_top: int | None,
) -> tuple[DecodeState, EditState | None, Int[Array, "M J"]]:
    """The sampling half of a step, per shard.

    Args:
      head: scores hidden states; holds this device's slice of the vocabulary.
      state: of the slots.
      edits: of the slots; None for a step without edited rows.
      hidden, rows: what the forward half returned.
      variant: which sampler.
      num_top: report log-probabilities, before any edit, and those of so many of the most likely tokens; None for none.

    Returns:
      The states with the new last tokens, and int32[M, 1] token ids, followed by the columns of score where
      log-probabilities are reported.
    """
    raw = _raw_logits(head, hidden)
    logits = raw if edits is None else logit_edits.edited(raw, edits, rows.slot, rows.position)
    if variant is SamplerVariant.GREEDY:
        tokens = sampling.greedy(logits)
    else:
        numbers = SamplingNumbers.unpack(rows.sampling)
        tokens = _SAMPLERS[variant](logits, numbers, rows.position)
    beyond = state.last_token.shape[0]  # out of bounds, hence dropped
    fed = jnp.where(rows.feeds == 1, rows.slot, beyond)
    last_token = state.last_token.at[fed].set(tokens, mode="drop")
    state = DecodeState(
        last_token=last_token, length=state.length, page_table=state.page_table, sampling=state.sampling
    )
    if edits is not None:
        edits = logit_edits.count_outputs(edits, rows.slot, tokens, rows.feeds == 1)
    columns = [tokens[:, None]] if num_top is None else [tokens[:, None], _scores(raw, tokens, num_top)]
    return state, edits, jnp.concatenate(columns, axis=1)


def score_step(
    head: VocabularyEmbedding, hidden: Float[Array, "T D"], targets: Int[Array, " T"], *, num_top: int
) -> Int[Array, "T J"]:
    """Scores given tokens, in blocks, so that few rows of logits exist at a time; per shard.

    Args:
      head: scores hidden states; holds this device's slice of the vocabulary.
      hidden: of the tokens in front.
      targets: int32[T]; where one is no token, its results mean nothing.
      num_top: how many of the most likely tokens to report as well.

    Returns:
      The columns logprob, rank, top ids.., top logprobs.., floats as their bits.
    """
    num_tokens = hidden.shape[0]
    block = math.gcd(num_tokens, SCORE_BLOCK)

    def scored(rows: tuple[Array, Array]) -> Array:
        return _scores(_raw_logits(head, rows[0]), rows[1], num_top)

    blocks = lax.map(scored, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
    return blocks.reshape(num_tokens, -1)


def _raw_logits(head: VocabularyEmbedding, hidden: Float[Array, "M D"]) -> Float[Array, "M V"]:
    """A diverged model must not crash the engine: NaN never wins, and a row of nothing yields token 0."""
    logits = head.logits(hidden)
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _scores(logits: Float[Array, "M V"], tokens: Int[Array, " M"], num_top: int) -> Int[Array, "M J"]:
    found = sampling.token_logprobs(logits, tokens, num_top=num_top)
    columns = (_bits(found.logprob[:, None]), found.rank[:, None], found.top_ids, _bits(found.top_logprobs))
    return jnp.concatenate(columns, axis=1)


def _bits(x: Float[Array, "M J"]) -> Int[Array, "M J"]:
    return lax.bitcast_convert_type(x, jnp.int32)
