"""Fused rows: one pair of functions, each the other's inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.fusion import PartSlice, fused_rows, stored_rows, unfuse
from jaxinfer.layers.linear import FusedPart


def fuse(tensors: list[np.ndarray], num_shards: int) -> np.ndarray:
    """The oracle: [part 0 | part 1 | ..] of every shard, one after the other."""
    shards = [np.split(tensor, num_shards) for tensor in tensors]
    return np.concatenate([shard[t] for t in range(num_shards) for shard in shards])


@st.composite
def fused_cases(draw):
    num_shards = draw(st.integers(1, 4))
    sizes = [num_shards * size for size in draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))]
    start, stop = sorted(draw(st.tuples(st.integers(0, sum(sizes)), st.integers(0, sum(sizes)))))
    return sizes, num_shards, start, stop


@settings(deadline=None)
@given(fused_cases())
def test_fused_rows_any_range_equals_concatenation(case) -> None:
    sizes, num_shards, start, stop = case
    tensors = [1000 * part + np.arange(2 * size).reshape(size, 2) for part, size in enumerate(sizes)]
    fused = fuse(tensors, num_shards)
    rows = list(fused_rows(sizes, num_shards, start, stop))
    assert all(entry.start < entry.stop for entry in rows)
    pieces = [tensors[entry.part][entry.start : entry.stop] for entry in rows]
    assert np.array_equal(np.concatenate([np.empty((0, 2), int), *pieces]), fused[start:stop])
    for tensor, part in zip(tensors, unfuse(fused, [FusedPart(size) for size in sizes], num_shards), strict=True):
        assert np.array_equal(tensor, part)


def test_fused_rows_two_shards_interleaves_parts() -> None:
    assert list(fused_rows((4, 2), 2, 1, 6)) == [
        PartSlice(part=0, start=1, stop=2),
        PartSlice(part=1, start=0, stop=1),
        PartSlice(part=0, start=2, stop=4),
        PartSlice(part=1, start=1, stop=2),
    ]


def test_fused_rows_indivisible_size_raises() -> None:
    with pytest.raises(ValueError, match="6 output features cannot be split over 4 tensor shards"):
        list(fused_rows((8, 6), 4, 0, 14))
    with pytest.raises(ValueError, match="6 output features"):
        unfuse(np.zeros((6, 2)), (FusedPart(6),), 4)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.data())
def test_stored_rows_copies_stand_next_to_each_other(num_groups: int, copies: int, unit: int, data) -> None:
    part = FusedPart(num_groups * unit, copies=copies, unit=unit)
    tensor = np.arange(part.stored)
    repeated = tensor.reshape(num_groups, unit).repeat(copies, axis=0).ravel()
    assert repeated.size == part.size
    start, stop = sorted(data.draw(st.tuples(st.integers(0, part.size), st.integers(0, part.size))))
    pieces = [tensor[low:high] for low, high in stored_rows(part, start, stop)]
    assert np.array_equal(np.concatenate([np.empty(0, int), *pieces]), repeated[start:stop])
    assert np.array_equal(unfuse(repeated, [part], 1)[0], tensor)
