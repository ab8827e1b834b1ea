"""The upload of a step's arrays to the device.

Owns: the layout of the upload, one vector of int32 words, so that a step makes only one.
Does not know: what the arrays are for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxinfer.wrappers.step_batch import SAMPLING_FIELDS, StepBatch
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes


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
