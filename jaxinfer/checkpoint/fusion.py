"""Fused parameters: several checkpoint tensors in one array, interleaved shard by shard along their output features.

With 2 shards, the rows of a fused parameter of q, k and v are [q_0 | k_0 | v_0 | q_1 | k_1 | v_1]: shard t holds slice
t of every tensor, and one product per shard computes all three.

Owns: the mapping between the rows of a fused parameter and those of its checkpoint tensors, in both directions.
Does not know: files, meshes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.layers.linear import FusedPart


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSlice:
    """Rows start:stop of the part with number `part`, which one checkpoint tensor contributes."""

    part: int
    start: int
    stop: int


def fused_rows(sizes: Sequence[int], num_shards: int, start: int, stop: int) -> Iterator[PartSlice]:
    """The rows of its parts that make up rows start:stop of a fused parameter, in order.

    Args:
      sizes: output features of each part (copies included), all multiples of num_shards.
      num_shards: tensor shards of the mesh.
      start, stop: rows of the fused parameter.

    Raises:
      ValueError: a size is not a multiple of num_shards.
    """
    for size in sizes:
        if size % num_shards:
            raise ValueError(f"{size} output features cannot be split over {num_shards} tensor shards")
    position = 0
    for shard in range(num_shards):
        for part, size in enumerate(sizes):
            rows = size // num_shards
            low, high = max(start, position), min(stop, position + rows)
            if low < high:
                first = shard * rows - position
                yield PartSlice(part=part, start=first + low, stop=first + high)
            position += rows


def stored_rows(part: FusedPart, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The checkpoint tensor's rows that make up rows start:stop of a part, as (start, stop) ranges in order.

    Without copies that is one range. With copies, each copy of a group of rows is a range of its own.
    """
    if part.copies == 1:
        yield start, stop
        return
    while start < stop:
        group, offset = divmod(start, part.unit)
        count = min(stop - start, part.unit - offset)
        first = group // part.copies * part.unit + offset
        yield first, first + count
        start += count


def unfuse(fused: np.ndarray, parts: Sequence[FusedPart], num_shards: int) -> list[np.ndarray]:
    """The checkpoint tensors of a whole fused parameter, [stored, ...] each.

    Copies of the same rows are equal, so it does not matter that each overwrites the one before.
    """
    tensors = [np.empty((part.stored, *fused.shape[1:]), fused.dtype) for part in parts]
    position = 0
    for piece in fused_rows([part.size for part in parts], num_shards, 0, sum(part.size for part in parts)):
        for low, high in stored_rows(parts[piece.part], piece.start, piece.stop):
            tensors[piece.part][low:high] = fused[position : position + high - low]
            position += high - low
    return tensors
