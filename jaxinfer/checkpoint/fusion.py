"""Fused parameters: several checkpoint tensors side by side along their output features, shard by shard.

Owns: the one pair of functions between fused rows and checkpoint rows. Shard t of s holds part t of every tensor, in
order: [q_t | k_t | v_t], so that one product per shard yields all of them.
Does not know: files, meshes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRows:
    """Rows start:stop of tensor number `part`."""

    part: int
    start: int
    stop: int


def fused_rows(sizes: Sequence[int], num_shards: int, start: int, stop: int) -> Iterator[PartRows]:
    """The checkpoint rows that make up rows start:stop of a fused parameter, in order.

    Args:
      sizes: output features of each checkpoint tensor, all multiples of num_shards.
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
                yield PartRows(part=part, start=first + low, stop=first + high)
            position += rows


def unfuse(fused: np.ndarray, sizes: Sequence[int], num_shards: int) -> list[np.ndarray]:
    """The checkpoint tensors [size, ...] of a whole fused parameter [sum(sizes), ...]."""
    parts = [np.empty((size, *fused.shape[1:]), fused.dtype) for size in sizes]
    position = 0
    for rows in fused_rows(sizes, num_shards, 0, fused.shape[0]):
        count = rows.stop - rows.start
        parts[rows.part][rows.start : rows.stop] = fused[position : position + count]
        position += count
    return parts
