"""The device half of the decoder wrapper: one step of one shard.

Owns: the decode state by slot, the words of a step's upload, and the two halves of a step (forward, sample).
Does not know: compiled programs, numpy batches, requests.

A step is two programs, forward and sample, so that programs number shapes + samplers instead of shapes x samplers.
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

from jaxinfer import sampling
from jaxinfer.communication.collectives import share_from_last_stage
from jaxinfer.layers.attention import Segment, TokenBatch
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.kv_cache import DUMP_PAGE, LayerCache
from jaxinfer.models.registry import Decoder
from jaxinfer.request import MAX_LOGPROBS
from jaxinfer.sampling import SamplingNumbers
from jaxinfer.wrappers.step_batch import PREFILL_BLOCK, SAMPLING_FIELDS, SamplerVariant, StepBatch, StepShape


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
    """The arrays of a StepBatch that the forward half reads; fields and shapes as there."""

    decode_slots: Int[Array, " R"]
    decode_page_index: Int[Array, " R"]
    decode_page_id: Int[Array, " R"]
    prefill_slots: Int[Array, " P"]
    prefill_start: Int[Array, " P"]
    prefill_len: Int[Array, " P"]
    prefill_tokens: Int[Array, "P Q"]
    prefill_pages: Int[Array, "P W"]
    prefill_sampling: Int[Array, "P F"]
    logit_index: Int[Array, " M"]


def _input_shapes(shape: StepShape, table_width: int) -> dict[str, tuple[int, ...]]:
    rows, chunks = (shape.num_decode,), (shape.num_prefill,)
    return {
        "decode_slots": rows,
        "decode_page_index": rows,
        "decode_page_id": rows,
        "prefill_slots": chunks,
        "prefill_start": chunks,
        "prefill_len": chunks,
        "prefill_tokens": (*chunks, PREFILL_BLOCK),
        "prefill_pages": (*chunks, table_width),
        "prefill_sampling": (*chunks, SAMPLING_FIELDS),
        "logit_index": (shape.num_logits,),
    }


def num_input_words(shape: StepShape, table_width: int) -> int:
    """int32 words of a step's upload."""
    return sum(math.prod(dims) for dims in _input_shapes(shape, table_width).values())


def pack_inputs(batch: StepBatch, table_width: int) -> np.ndarray:
    """A step's forward inputs as one int32 vector: one upload a step."""
    names = _input_shapes(batch.shape, table_width)
    return np.concatenate([getattr(batch, name).ravel() for name in names])


def unpack_inputs(words: Int[Array, " J"], shape: StepShape, table_width: int) -> StepInputs:
    """The inverse of pack_inputs, on the device."""
    arrays, start = {}, 0
    for name, dims in _input_shapes(shape, table_width).items():
        size = math.prod(dims)
        arrays[name] = words[start : start + size].reshape(dims)
        start += size
    return StepInputs(**arrays)


class DecoderStep(nnx.Module):
    """A model's parameters and the forward half of a step, per shard.

    Args:
      model: an nnx module with the Decoder protocol.
      page_size: C in tokens.
    """

    def __init__(self, model: Decoder, *, page_size: int):
        self.model = model
        self.page_size = page_size

    def __call__(
        self, state: DecodeState, caches: Sequence[LayerCache], inputs: StepInputs
    ) -> tuple[DecodeState, list[LayerCache], Float[Array, "M D"], Int[Array, " M"]]:
        """Advances the slots by one step, up to the hidden states that the head will score.

        Returns:
          The new state, the written caches, normalised hidden states [M, D] and the position int32[M] that a token
          sampled from each of them will have.
        """
        state = _with_changes(state, inputs)
        batch = self._tokens(state, inputs)
        x = self.model.embed(batch.token_ids, batch.positions)
        x, caches = self.model.run_layers(x, caches, batch)
        num_decode, max_decode = inputs.decode_slots.shape[0], state.length.shape[0] - 1
        index = inputs.logit_index
        index = jnp.where(index < max_decode, index, index - max_decode + num_decode)
        x = share_from_last_stage(x[index])
        state = _advanced(state, inputs)
        return state, caches, self.model.final_norm(x), batch.positions[index] + 1

    def _tokens(self, state: DecodeState, inputs: StepInputs) -> TokenBatch:
        """Lays the tokens of both segments out flat, with positions and cache slots."""
        dump_slot = state.length.shape[0] - 1
        decode_live = (inputs.decode_slots != dump_slot).astype(jnp.int32)
        token_ids, positions, pages, segments = [], [], [], []
        if inputs.decode_slots.shape[0]:
            start = state.length[inputs.decode_slots]
            token_ids.append(state.last_token[inputs.decode_slots])
            positions.append(start)
            table = state.page_table[inputs.decode_slots]
            pages.append(self._pages(table, start[:, None], decode_live))
            segments.append(Segment(table, start + decode_live, decode_live, num_queries=1))
        if inputs.prefill_slots.shape[0]:
            where = inputs.prefill_start[:, None] + jnp.arange(PREFILL_BLOCK, dtype=jnp.int32)
            token_ids.append(inputs.prefill_tokens.ravel())
            positions.append(where.ravel())
            pages.append(self._pages(inputs.prefill_pages, where, inputs.prefill_len))
            kv_len = inputs.prefill_start + inputs.prefill_len
            segments.append(Segment(inputs.prefill_pages, kv_len, inputs.prefill_len, num_queries=PREFILL_BLOCK))
        all_positions = jnp.concatenate(positions)
        return TokenBatch(
            token_ids=jnp.concatenate(token_ids),
            positions=all_positions,
            pages=jnp.concatenate(pages),
            offsets=all_positions % self.page_size,
            segments=tuple(segments),
        )

    def _pages(
        self, table: Int[Array, "R W"], positions: Int[Array, "R Q"], num_live: Int[Array, " R"]
    ) -> Int[Array, " T"]:
        """Page of every token, flat; the dump page beyond a row's live tokens."""
        entry = jnp.minimum(positions // self.page_size, table.shape[1] - 1)
        live = jnp.arange(positions.shape[1]) < num_live[:, None]
        return jnp.where(live, jnp.take_along_axis(table, entry, axis=1), DUMP_PAGE).ravel()


def _with_changes(state: DecodeState, inputs: StepInputs) -> DecodeState:
    """The state with the step's new page table entries and sampling numbers."""
    page_table = state.page_table.at[inputs.prefill_slots].set(inputs.prefill_pages)
    # Index W, which padding and rows without a new page carry, is out of bounds and dropped.
    page_table = page_table.at[inputs.decode_slots, inputs.decode_page_index].set(inputs.decode_page_id, mode="drop")
    return DecodeState(
        last_token=state.last_token,
        length=state.length,
        page_table=page_table,
        sampling=state.sampling.at[inputs.prefill_slots].set(inputs.prefill_sampling),
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
    hidden: Float[Array, "M D"],
    position: Int[Array, " M"],
    rows: Int[Array, "2 M"],
    *,
    variant: SamplerVariant,
    logprobs: bool,
) -> tuple[DecodeState, Int[Array, "M J"]]:
    """The sampling half of a step, per shard.

    Args:
      head: scores hidden states; holds this device's slice of the vocabulary.
      state: of the slots.
      hidden, position: what the forward half returned.
      rows: int32[2, M], each position's slot and whether its token feeds that slot.
      variant: which sampler.
      logprobs: report them.

    Returns:
      The state with the new last tokens, and int32[M, 1] token ids, followed with logprobs by the bits of
      [logprob, rank, top ids.., top logprobs..].
    """
    slots, feeds = rows
    logits = head.logits(hidden)
    # A diverged model must not crash the engine: NaN never wins, and a row of nothing yields token 0.
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    if variant is SamplerVariant.GREEDY:
        tokens = sampling.greedy(logits)
    else:
        numbers = SamplingNumbers.unpack(state.sampling[slots])
        sampler = sampling.sample_full if variant is SamplerVariant.FULL else sampling.sample_candidates
        tokens = sampler(logits, numbers, position)
    dump_slot = state.last_token.shape[0] - 1
    last_token = state.last_token.at[jnp.where(feeds == 1, slots, dump_slot)].set(tokens)
    state = DecodeState(
        last_token=last_token, length=state.length, page_table=state.page_table, sampling=state.sampling
    )
    columns = [tokens[:, None]]
    if logprobs:
        found = sampling.token_logprobs(logits, tokens, num_top=MAX_LOGPROBS)
        columns += [_bits(found.logprob[:, None]), found.rank[:, None], found.top_ids, _bits(found.top_logprobs)]
    return state, jnp.concatenate(columns, axis=1)


def _bits(x: Float[Array, "M J"]) -> Int[Array, "M J"]:
    return lax.bitcast_convert_type(x, jnp.int32)
