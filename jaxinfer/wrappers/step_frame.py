"""A StepBatch as bytes, for the processes that run the same step.

Owns: which numbers and arrays the bytes have, and the checks of what comes in.
Does not know: sockets, jax, requests.

A frame is a row of int32: the step's shape and settings, then the sizes of each group of arrays (StepBatch, SlotEdits,
AllowedTokens). The arrays follow (see array_frame.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxinfer.wrappers.array_frame import WORD, FrameError, dims, pack_arrays, read_arrays
from jaxinfer.wrappers.step_batch import (
    NO_TARGET,
    SAMPLING_FIELDS,
    AllowedTokens,
    SamplerVariant,
    SlotEdits,
    StepBatch,
)
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes

_VARIANTS = tuple(SamplerVariant)
_NONE = -1
_NUM_SETTINGS = 9
_SLOTS = ("decode_slots", "chunk_slots", "prefill_slots", "logit_slots")
_PAGES = ("decode_page_id", "chunk_pages", "page_copies")


def pack_step(batch: StepBatch) -> bytes:
    """The frame of a step."""
    shape = batch.shape
    head = [
        shape.num_decode,
        shape.num_prefill,
        shape.row_len,
        shape.num_logits,
        shape.scored,
        _VARIANTS.index(batch.variant),
        _NONE if batch.num_top is None else batch.num_top,
        batch.edited,
        batch.targets is not None,
    ]
    parts: list[bytes] = []
    for group in (batch, batch.edits, batch.allowed):
        sizes, data = pack_arrays(group)
        head += sizes
        parts.append(data)
    return np.array(head, np.int32).tobytes() + b"".join(parts)


def unpack_step(frame: bytes, shapes: StepShapes, *, num_pages: int, vocab_size: int) -> StepBatch:
    """Reads a frame.

    Args:
      frame: from pack_step.
      shapes: the model's, whose limits all values have to keep.
      num_pages: KV pages of the model, without the dump page.
      vocab_size: of the model.

    Returns:
      The step; its arrays are views of the frame and read-only.

    Raises:
      FrameError: the frame is too short or too long, or has a value that no step of this model has.
    """
    kinds: tuple[Any, ...] = (StepBatch, SlotEdits, AllowedTokens)
    num_words = _NUM_SETTINGS + sum(len(dims(kind)) for kind in kinds)
    if len(frame) < num_words * WORD:
        raise FrameError(f"a step has at least {num_words * WORD} bytes, got {len(frame)}")
    head = np.frombuffer(frame, np.int32, num_words).tolist()
    num_decode, num_prefill, row_len, num_logits, scored, variant, num_top, edited, has_targets = head[:_NUM_SETTINGS]
    if not 0 <= variant < len(_VARIANTS):
        raise FrameError(f"a sampler's number must be in 0..{len(_VARIANTS) - 1}, got {variant}")
    words, offset = iter(head[_NUM_SETTINGS:]), num_words * WORD
    groups: list[dict[str, Any]] = []
    for kind in kinds:
        sizes = {name: next(words) for name in dims(kind)}
        arrays, offset = read_arrays(kind, frame, offset, sizes, missing=() if has_targets else ("targets",))
        groups.append(arrays)
    if offset != len(frame):
        raise FrameError(f"a step of these sizes has {offset} bytes, got {len(frame)}")
    batch = StepBatch(
        **groups[0],
        shape=StepShape(
            num_decode=num_decode,
            num_prefill=num_prefill,
            row_len=row_len,
            num_logits=num_logits,
            scored=bool(scored),
        ),
        dump_slot=shapes.num_slots,
        variant=_VARIANTS[variant],
        num_top=None if num_top == _NONE else num_top,
        edited=bool(edited),
        edits=SlotEdits(**groups[1]),
        allowed=AllowedTokens(**groups[2]),
    )
    _check(batch, shapes, num_pages=num_pages, vocab_size=vocab_size)
    return batch


def _check(batch: StepBatch, shapes: StepShapes, *, num_pages: int, vocab_size: int) -> None:
    """Refuses what would make a program read or write where it must not."""
    shape, edits, allowed = batch.shape, batch.edits, batch.allowed
    if shape not in shapes:
        raise FrameError(f"no step of this model has the shape {shape}")
    sizes = {
        "decode_slots": (batch.decode_slots.shape, (shape.num_decode,)),
        "prefill_tokens": (batch.prefill_tokens.shape, (shape.num_prefill, PREFILL_BLOCK)),
        "logit_slots": (batch.logit_slots.shape, (shape.num_logits,)),
        "chunk_pages": (batch.chunk_pages.shape[1], shapes.table_width),
        "chunk_sampling": (batch.chunk_sampling.shape[1], SAMPLING_FIELDS),
        "edit entries": (int(edits.num_entries.sum()), len(edits.kinds)),
        "allowed words": (allowed.words.shape[1], -(-vocab_size // 32) if len(allowed.slots) else 0),
    }
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise FrameError(f"{name} must have size {expected}, got {found}")
    num_rows = shapes.max_decode + batch.prefill_tokens.size
    for name, array, low, high in (
        *((name, getattr(batch, name), 0, shapes.num_slots) for name in _SLOTS),
        *((name, getattr(batch, name), 0, num_pages) for name in _PAGES),
        ("decode_page_index", batch.decode_page_index, 0, shapes.table_width),
        ("prefill_start", batch.prefill_start, 0, shapes.max_model_len - 1),
        ("prefill_len", batch.prefill_len, 0, shape.row_len),
        ("prefill_tokens", batch.prefill_tokens, 0, vocab_size - 1),
        ("logit_index", batch.logit_index, 0, num_rows - 1),
        ("targets", batch.targets, NO_TARGET, vocab_size - 1),
        ("slots of edits", edits.slots, 0, shapes.num_slots),
        ("token_ids of edits", edits.token_ids, 0, vocab_size - 1),
        ("slots of allowed tokens", allowed.slots, 0, shapes.num_slots),
    ):
        if array is not None and array.size and not low <= array.min() <= array.max() <= high:
            raise FrameError(f"{name} must be in {low}..{high}, got {array.min()}..{array.max()}")
