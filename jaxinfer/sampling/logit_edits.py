"""The edits of logits that requests ask for, before temperature and filters: masks, biases and penalties.

Owns: the state that the device keeps for these edits, a row per slot (the place of a running sequence), and their
arithmetic.
Does not know: requests, samplers.

All functions run inside a shard_map over ("pipe", "tensor"). The columns of the state, one per token id, are sharded
over the mesh like the vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.communication.collectives import vocabulary_shard
from jaxinfer.communication.sharding import REPLICATED, VOCABULARY_COLUMNS
from jaxinfer.request import EditKind


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EditState:
    """The edits of all S slots.

    Args:
      bias: float32[S, V], added to the logits; -inf for a token that the request never allows.
      forbidden: bool[S, V], tokens that may not be sampled next; set_allowed changes them during generation.
      masked_until_min_position: bool[S, V], tokens that may not be sampled at positions before min_position, such
        as the end token of a request with min_tokens.
      in_prompt: bool[S, V], tokens that occur in the prompt.
      output_count: int32[S, V], how often each token was sampled.
      penalties: float32[S, 3], the repetition, presence and frequency penalties. A repetition penalty of 1 changes
        nothing; 0 marks a slot that was never set and changes nothing either.
      min_position: int32[S], the first position in the text at which the tokens of masked_until_min_position are
        allowed.
    """

    bias: Float[Array, "S V"]
    forbidden: Bool[Array, "S V"]
    masked_until_min_position: Bool[Array, "S V"]
    in_prompt: Bool[Array, "S V"]
    output_count: Int[Array, "S V"]
    penalties: Float[Array, "S 3"]
    min_position: Int[Array, " S"]

    @classmethod
    def zeros(cls, num_slots: int, vocab_size: int) -> EditState:
        """The state in which no slot has any edits."""
        shape = (num_slots, vocab_size)
        return cls(
            bias=jnp.zeros(shape, jnp.float32),
            forbidden=jnp.zeros(shape, bool),
            masked_until_min_position=jnp.zeros(shape, bool),
            in_prompt=jnp.zeros(shape, bool),
            output_count=jnp.zeros(shape, jnp.int32),
            penalties=jnp.zeros((num_slots, 3), jnp.float32),
            min_position=jnp.zeros(num_slots, jnp.int32),
        )

    @staticmethod
    def specs() -> list[PartitionSpec]:
        """The PartitionSpec of each field, in order. Fields with one column per token are sharded by vocabulary."""
        return [VOCABULARY_COLUMNS] * 5 + [REPLICATED] * 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EditEntries:
    """Edits to be made in one slot, as up to J entries of (kind, token id, value).

    Args:
      slot: int32[], the slot.
      first: bool[], true for the first entries of a sequence: whatever the slot held before is cleared.
      bias_of_others: float32[], with `first`, the bias of all tokens without a BIAS entry: -inf if the request lists
        its allowed tokens.
      penalties, min_position: the slot's values, as in EditState.
      kinds: int32[J], the EditKind of each entry; any other number is padding.
      token_ids: int32[J], the token of each entry.
      values: float32[J], the bias of BIAS entries; other kinds ignore it.
    """

    slot: Int[Array, ""]
    first: Bool[Array, ""]
    bias_of_others: Float[Array, ""]
    penalties: Float[Array, " 3"]
    min_position: Int[Array, ""]
    kinds: Int[Array, " J"]
    token_ids: Int[Array, " J"]
    values: Float[Array, " J"]


def set_slot(state: EditState, entries: EditEntries) -> EditState:
    """The state after some entries of one slot; the first entries of a sequence clear what the slot held."""
    size = state.bias.shape[1]
    local = entries.token_ids - vocabulary_shard() * size
    local = jnp.where((local >= 0) & (local < size), local, size)  # out of bounds, hence dropped

    def of(kind: EditKind) -> Array:
        return jnp.where(entries.kinds == kind, local, size)

    def row(rows: Array, cleared: float | Array) -> Array:
        return jnp.where(entries.first, jnp.full(size, cleared, rows.dtype), rows[entries.slot])

    def put(rows: Array, new: Array) -> Array:
        return rows.at[entries.slot].set(new)

    bias = row(state.bias, entries.bias_of_others).at[of(EditKind.BIAS)].set(entries.values, mode="drop")
    masked_until_min_position = (
        row(state.masked_until_min_position, 0).at[of(EditKind.MASKED_UNTIL_MIN_TOKENS)].set(True, mode="drop")
    )
    in_prompt = row(state.in_prompt, 0).at[of(EditKind.PROMPT)].set(True, mode="drop")
    output_count = row(state.output_count, 0).at[of(EditKind.OUTPUT)].add(1, mode="drop")
    return EditState(
        bias=put(state.bias, bias),
        forbidden=put(state.forbidden, row(state.forbidden, 0)),
        masked_until_min_position=put(state.masked_until_min_position, masked_until_min_position),
        in_prompt=put(state.in_prompt, in_prompt),
        output_count=put(state.output_count, output_count),
        penalties=put(state.penalties, entries.penalties),
        min_position=put(state.min_position, entries.min_position),
    )


def set_allowed(state: EditState, slots: Int[Array, " J"], words: Int[Array, "J K"]) -> EditState:
    """The state in which given slots may sample only given tokens next.

    Args:
      state: of all slots.
      slots: int32[J], the slots to change; -1 is padding.
      words: int32[J, K], a bitmask of allowed tokens per slot: token t is bit t % 32 of word t // 32. Tokens beyond
        the last word are forbidden.
    """
    token_ids = vocabulary_shard() * state.bias.shape[1] + jnp.arange(state.bias.shape[1])
    bits = words.at[:, token_ids // 32].get(mode="fill", fill_value=0) >> (token_ids % 32)
    slots = jnp.where(slots < 0, state.bias.shape[0], slots)  # out of bounds, hence dropped
    return dataclasses.replace(state, forbidden=state.forbidden.at[slots].set(bits & 1 == 0, mode="drop"))


def edited(
    logits: Float[Array, "R V"], state: EditState, slots: Int[Array, " R"], position: Int[Array, " R"]
) -> Float[Array, "R V"]:
    """Applies each slot's edits to its logits, in this order: masks, bias, repetition, presence, frequency.

    Args:
      logits: float32[R, V / devices], this device's slice.
      state: of all slots.
      slots: int32[R], the slot of each row.
      position: int32[R], index in its text of the token to be sampled.

    Source: Keskar et al. 2019, "CTRL", section 4.1, for the repetition penalty, which divides positive logits and
    multiplies negative ones; presence and frequency penalties as in OpenAI's API.
    """
    count, penalties = state.output_count[slots], state.penalties[slots]
    too_early = state.masked_until_min_position[slots] & (position < state.min_position[slots])[:, None]
    logits = jnp.where(too_early | state.forbidden[slots], -jnp.inf, logits) + state.bias[slots]
    repetition, presence, frequency = (penalties[:, i, None] for i in range(3))
    seen = state.in_prompt[slots] | (count > 0)
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen & (repetition != 0), penalised, logits)
    return logits - jnp.where(count > 0, presence + frequency * count.astype(jnp.float32), 0.0)


def count_outputs(
    state: EditState, slots: Int[Array, " R"], token_ids: Int[Array, " R"], is_live: Bool[Array, " R"]
) -> EditState:
    """The state after one token per row was sampled: its count goes up by one.

    Args:
      state: of all slots.
      slots: int32[R], the slot of each row.
      token_ids: int32[R], the sampled tokens.
      is_live: bool[R], false for rows that are not counted.
    """
    size = state.bias.shape[1]
    local = token_ids - vocabulary_shard() * size
    local = jnp.where((local >= 0) & (local < size) & is_live, local, size)
    return dataclasses.replace(state, output_count=state.output_count.at[slots, local].add(1, mode="drop"))
