"""The upload of logit edits and allowed tokens to the device.

Owns: the layout of the uploads in int32 words. All uploads of a kind have one size, so that one program serves them; a
slot with many entries takes several.
Does not know: what the edits do.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jaxinfer.sampling.logit_edits import EditEntries
from jaxinfer.wrappers.step_batch import AllowedTokens, SlotEdits

NUM_ENTRIES = 1024
"""Entries of one upload of edits."""
_HEADER = 7
NUM_WORDS = _HEADER + 3 * NUM_ENTRIES
_PADDING = -1
NUM_SLOTS = 8
"""Slots of one upload of allowed tokens."""


def pack_edits(edits: SlotEdits, row: int) -> Iterator[Int32[np.ndarray, " J"]]:
    """The uploads that set the edits of one slot, to be made in order; at least one, even without entries.

    Args:
      edits: the edits of several slots.
      row: which of these slots.
    """
    numbers = np.array([edits.bias_of_others[row], *edits.penalties[row]], np.float32).view(np.int32)
    first = int(edits.num_entries[:row].sum())
    end = first + int(edits.num_entries[row])
    for start in range(first, max(end, first + 1), NUM_ENTRIES):
        part = slice(start, min(start + NUM_ENTRIES, end))
        columns = np.full((3, NUM_ENTRIES), _PADDING, np.int32)
        for column, entries in zip(columns, (edits.kinds, edits.token_ids, edits.values.view(np.int32)), strict=True):
            column[: part.stop - start] = entries[part]
        header = np.array([edits.slots[row], start == first, edits.min_position[row]], np.int32)
        yield np.concatenate([header, numbers, columns.ravel()])


def unpack_edits(words: Int[Array, " J"]) -> EditEntries:
    """The inverse of pack_edits for one upload, on the device."""
    numbers = _floats(words[3:_HEADER])
    kinds, token_ids, values = words[_HEADER:].reshape(3, NUM_ENTRIES)
    return EditEntries(
        slot=words[0],
        first=words[1] == 1,
        bias_of_others=numbers[0],
        penalties=numbers[1:],
        min_position=words[2],
        kinds=kinds,
        token_ids=token_ids,
        values=_floats(values),
    )


def num_allowed_words(vocab_size: int) -> int:
    """How many int32 words an upload of allowed tokens has, for a vocabulary with the mesh's padding."""
    return NUM_SLOTS * (1 + _num_mask_words(vocab_size))


def pack_allowed(allowed: AllowedTokens, vocab_size: int) -> Iterator[Int32[np.ndarray, " J"]]:
    """The uploads that set the allowed tokens of some slots."""
    for start in range(0, len(allowed.slots), NUM_SLOTS):
        slots = allowed.slots[start : start + NUM_SLOTS]
        words = np.zeros((NUM_SLOTS, 1 + _num_mask_words(vocab_size)), np.int32)
        words[:, 0] = _PADDING
        words[: len(slots), 0] = slots
        masks = allowed.words[start : start + NUM_SLOTS].view(np.int32)
        words[: len(slots), 1 : 1 + masks.shape[1]] = masks
        yield words.ravel()


def unpack_allowed(words: Int[Array, " J"]) -> tuple[Int[Array, " S"], Int[Array, "S K"]]:
    """The inverse of pack_allowed for one upload, on the device: slots (-1 for padding) and words of their masks."""
    rows = words.reshape(NUM_SLOTS, -1)
    return rows[:, 0], rows[:, 1:]


def _num_mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def _floats(words: Int[Array, " J"]) -> Float[Array, " J"]:
    return lax.bitcast_convert_type(words, jnp.float32)
