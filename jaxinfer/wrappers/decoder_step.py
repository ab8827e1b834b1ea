"""What the device computes in one step, written for one shard.

Owns: the decode state by slot, the layout of a step's upload, and the two halves of a step (forward, sample).
Does not know: how programs are compiled, requests.

Forward and sample become separate programs, so that with 20 shapes and 4 samplers there are 24 programs to compile
instead of 80. A third program scores the tokens of prompts.
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
"""Rows of logits that exist at a time, at most, while prompts are scored."""
_SAMPLERS = {
    SamplerVariant.UNFILTERED: sampling.sample_unfiltered,
    SamplerVariant.CANDIDATES: sampling.sample_candidates,
    SamplerVariant.FULL: sampling.sample_full,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What the device keeps for every slot between steps; the last of the S + 1 slots is the dump slot.

    Args:
      last_token: int32[S + 1], the last sampled token, which is the input of the slot's next decode row.
      length: int32[S + 1], positions whose keys and values are in the cache.
      page_table: int32[S + 1, W], page ids.
      sampling: int32[S + 1, SAMPLING_FIELDS], as pack_sampling packs them.
    """

    last_token: Int[Array, " S"]
    length: Int[Array, " S"]
    page_table: Int[Array, "S W"]
    sampling: Int[Array, "S F"]

    @classmethod
    def zeros(cls, num_slots: int, table_width: int) -> DecodeState:
        """The state with no slot in use."""
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
    """For every field of StepInputs, in the order of the upload: its dimensions and the value of its padding."""
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
    """How many int32 words a step uploads."""
    return sum(math.prod(dims) for dims, _ in _input_shapes(shape, shapes).values())


def pack_inputs(batch: StepBatch, shape: StepShape, shapes: StepShapes) -> np.ndarray:
    """A step's inputs, padded to a shape that holds them, as one int32 vector, so that a step makes only one upload."""
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
    ) -> tuple[DecodeState, list[LayerCache], Ring | None, Float[Array, "M D"], LogitRows, Float[Array, "T D"] | None]:
        """Runs one tick of the pipeline: a batch enters, and every batch in flight moves on by one stage.

        With one stage, the batch that enters is also the one that leaves.

        Returns:
          The new state, the written caches and the ring. Then, of the batch that leaves the last stage, the normalised
          hidden states [M, D] for the head, the logit rows that tell how to sample from them, and, if scored, the
          normalised hidden states of all prefill tokens (else None).
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
        """The page of every token, flat; padding tokens write to the dump page."""
        entry = jnp.minimum(positions // self.page_size, rows.page_table.shape[1] - 1)
        live = jnp.arange(positions.shape[1]) < rows.q_len[:, None]
        return jnp.where(live, jnp.take_along_axis(rows.page_table, entry, axis=1), DUMP_PAGE).ravel()


def _positions(rows: SegmentRows, num_queries: int) -> Int[Array, "R Q"]:
    return rows.start[:, None] + jnp.arange(num_queries, dtype=jnp.int32)


def _with_changes(state: DecodeState, inputs: StepInputs) -> DecodeState:
    """The state with the step's new page table entries and sampling numbers."""
    page_table = state.page_table.at[inputs.chunk_slots].set(inputs.chunk_pages)
    # Padding and rows without a new page have index W, which is out of bounds and therefore dropped.
    page_table = page_table.at[inputs.decode_slots, inputs.decode_page_index].set(inputs.decode_page_id, mode="drop")
    return DecodeState(
        last_token=state.last_token,
        length=state.length,
        page_table=page_table,
        sampling=state.sampling.at[inputs.chunk_slots].set(inputs.chunk_sampling),
    )


def _advanced(state: DecodeState, inputs: StepInputs) -> DecodeState:
    """The state with every slot's length after the step; the dump slot's stays 0."""
    dump_slot = state.length.shape[0] - 1
    grown = state.length[inputs.decode_slots] + (inputs.decode_slots != dump_slot)
    length = state.length.at[inputs.decode_slots].set(grown)
    # All rows of a chunk name one slot. Its new length is the end of the last row, whatever length the slot had before.
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
    """The sampling half of a step, for one shard.

    Args:
      head: gives the logits of hidden states; holds this device's slice of the vocabulary.
      state: the decode state of all slots.
      edits: the logit edits of all slots; None for a step without edited rows.
      hidden, rows: what the forward half returned.
      variant: which sampler to run.
      num_top: how many of the most likely tokens to report, beside the sampled one, with log-probabilities before any
        edit; None reports no log-probabilities at all.

    Returns:
      The state with the new last tokens, the edits with the new tokens counted, and int32[M, J]: token ids in the first
      column, followed by the columns of score_step if log-probabilities are reported.
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
    """The log-probabilities of given tokens, for one shard; computed in blocks, so that few logits exist at a time.

    Args:
      head: gives the logits of hidden states; holds this device's slice of the vocabulary.
      hidden: hidden states of the tokens in front of the targets.
      targets: int32[T], the tokens to score; the row of a target that is no token id (NO_TARGET) means nothing.
      num_top: how many of the most likely tokens to report as well.

    Returns:
      int32[T, 2 + 2 * num_top], the columns logprob, rank, top ids.., top logprobs.., floats as their bits.
    """
    num_tokens = hidden.shape[0]
    block = math.gcd(num_tokens, SCORE_BLOCK)

    def scored(rows: tuple[Array, Array]) -> Array:
        return _scores(_raw_logits(head, rows[0]), rows[1], num_top)

    blocks = lax.map(scored, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
    return blocks.reshape(num_tokens, -1)


def _raw_logits(head: VocabularyEmbedding, hidden: Float[Array, "M D"]) -> Float[Array, "M V"]:
    """The head's logits with NaN replaced by -inf, so that a diverged model cannot crash the engine.

    A NaN is then never the largest, and a row of nothing but NaN yields token 0.
    """
    logits = head.logits(hidden)
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _scores(logits: Float[Array, "M V"], tokens: Int[Array, " M"], num_top: int) -> Int[Array, "M J"]:
    found = sampling.token_logprobs(logits, tokens, num_top=num_top)
    columns = (_bits(found.logprob[:, None]), found.rank[:, None], found.top_ids, _bits(found.top_logprobs))
    return jnp.concatenate(columns, axis=1)


def _bits(x: Float[Array, "M J"]) -> Int[Array, "M J"]:
    return lax.bitcast_convert_type(x, jnp.int32)
