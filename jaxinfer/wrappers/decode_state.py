"""What the device keeps for every slot between steps.

Owns: the state, and what a step changes in it before and after its tokens are computed.
Does not know: models, sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.wrappers.step_batch import SAMPLING_FIELDS
from jaxinfer.wrappers.step_inputs import StepInputs


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


def with_changes(state: DecodeState, inputs: StepInputs) -> DecodeState:
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


def advanced(state: DecodeState, inputs: StepInputs) -> DecodeState:
    """The state with every slot's length after the step; the dump slot's stays 0."""
    dump_slot = state.length.shape[0] - 1
    grown = state.length[inputs.decode_slots] + (inputs.decode_slots != dump_slot)
    length = state.length.at[inputs.decode_slots].set(grown)
    # All rows of a chunk name one slot. Its new length is the end of the last row, whatever length the slot had before.
    length = length.at[inputs.prefill_slots].set(0)
    length = length.at[inputs.prefill_slots].max(inputs.prefill_start + inputs.prefill_len)
    return DecodeState(last_token=state.last_token, length=length, page_table=state.page_table, sampling=state.sampling)
