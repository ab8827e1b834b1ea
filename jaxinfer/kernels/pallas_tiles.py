"""The attention of one thread block of a Pallas kernel: an online softmax over tiles of keys.

Owns: what a block loads of a tile, which of its keys a query sees, the softmax so far.
Does not know: which blocks there are, which rows and tiles each takes (kernels/pallas.py does).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_LEAST = -1e30  # the score of a masked position; finite, since -inf - -inf is NaN
_LEAST_TOP = -1e29  # initial maximum; exp2(_LEAST - _LEAST_TOP) is 0, so masked scores leave the total at 0
LOG2_E = math.log2(math.e)  # scores are kept in units of log 2, since the hardware's exponential is exp2
SMALLEST_DOT = 16  # rows and columns of the smallest matrix product that Triton supports
_HEAD_BYTES = 256
"""Bytes of a head of 128 dimensions in 16 bits, for which the kernels' tile sizes were chosen. Larger heads get smaller
tiles, since they would not fit into shared memory."""


class Inputs(NamedTuple):
    """The operands of a kernel: arrays where it is called, references inside it.

    Args:
        q: [T, N, H], the queries of all tokens of the step.
        k_pages, v_pages, sinks: as paged_attention's.
        window, sink_tokens: int32[1]; None for no window, and for no sink tokens beside one.
        page_table, kv_len, q_len, sequence_id: as Segment's.
    """

    q: Any
    k_pages: Any
    v_pages: Any
    page_table: Any
    kv_len: Any
    q_len: Any
    sequence_id: Any
    window: Any
    sink_tokens: Any
    sinks: Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is fixed when a kernel is compiled.

    Args:
        start: the segment's first token.
        num_queries: Q.
        scale, softcap: as paged_attention's.
    """

    start: int
    num_queries: int
    scale: float
    softcap: float | None


class Softmax(NamedTuple):
    """An online softmax over the keys seen so far, for M queries.

    Args:
        top: the largest score.
        total: the sum of the weights exp2(score - top).
        out: the sum of the values times these weights.
    """

    top: Float[Array, " M"]
    total: Float[Array, " M"]
    out: Float[Array, "M H"]


def attend(
    inputs: Inputs,
    found: Softmax,
    *,
    q: Float[Array, "M H"],
    query_position: Int[Array, " M"],
    row: Int[Array, ""],
    kv_head: Int[Array, ""],
    kv_len: Int[Array, ""],
    tile_len: int,
    tiles: tuple[Any, Any],
    settings: Settings,
    seen_from: Any = 0,
    masked: bool = True,
) -> Softmax:
    """Continues the softmax of M queries over a range of tiles of one row's keys.

    Args:
        inputs: references to the operands.
        found: the softmax over the keys before this range.
        q: queries.
        query_position: position of each query in its text; -1 for a query that sees none of these keys.
        row: the row whose page table is used.
        kv_head: the kv head whose keys and values are read.
        kv_len: positions of the row that hold keys.
        tile_len: positions in a tile.
        tiles: the first tile and the end (one past the last).
        settings: scale and softcap.
        seen_from: the first position that one of the queries sees within its window.
        masked: False where every query sees all keys of these tiles.
    """
    page_size, head_dim = inputs.k_pages.shape[2:]
    scale, softcap = settings.scale, settings.softcap
    dims, inside = head_dims(head_dim)
    dot = functools.partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def attend_tile(tile: Array, found: Softmax) -> Softmax:
        position = tile * tile_len + jnp.arange(tile_len)  # [B]
        if page_size % tile_len:
            page = plgpu.load(inputs.page_table.at[row, lax.div(jnp.minimum(position, kv_len - 1), page_size)])[:, None]
        else:  # the tile lies within one page
            page = inputs.page_table[row, lax.div(tile, page_size // tile_len)]
        where = (page, kv_head, lax.rem(position, page_size)[:, None], dims)
        # 0 * NaN is NaN: values need the mask too. Pages outside the window may be other texts' by now.
        live = position < kv_len if masked else position >= 0
        if inputs.window is not None:
            live &= _near_or_sink(inputs, position, seen_from)
        mask = inside & live[:, None]
        k = plgpu.load(inputs.k_pages.at[where], mask=mask, other=0.0)
        score = dot(q, k, (((1,), (1,)), ((), ())))  # [M, B]
        score = score * (scale * LOG2_E) if softcap is None else _capped(score * scale, softcap)
        if masked:
            visible = position[None, :] <= query_position[:, None]
            if inputs.window is not None:
                visible &= _near_or_sink(inputs, position[None, :], query_position[:, None] - inputs.window[0] + 1)
            score = jnp.where(visible, score, _LEAST)
        top = jnp.maximum(found.top, jnp.max(score, axis=1))
        weight = jnp.exp2(score - top[:, None])
        decay = jnp.exp2(found.top - top)
        v = plgpu.load(inputs.v_pages.at[where], mask=mask, other=0.0)
        gain = dot(weight.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        if masked:  # a value of NaN must not reach the queries of other texts in the tile, whose weights are 0
            gain = jnp.where((query_position >= 0)[:, None], gain, 0.0)
        return Softmax(
            top=top, total=found.total * decay + jnp.sum(weight, axis=1), out=found.out * decay[:, None] + gain
        )

    return lax.fori_loop(*tiles, attend_tile, found)


def seen_from(inputs: Inputs, query_position: Any) -> Any:
    """The first position within the window of a query at this position."""
    return jnp.maximum(query_position - inputs.window[0] + 1, 0)


def _near_or_sink(inputs: Inputs, position: Any, first: Any) -> Any:
    """Which positions a query sees whose window begins at `first`."""
    near = position >= first
    return near if inputs.sink_tokens is None else near | (position < inputs.sink_tokens[0])


def num_sink_tiles(inputs: Inputs, kv_len: Any, first: Any, tile_len: int) -> Any:
    """Tiles in front of tile `first` that hold sink tokens of a row."""
    return jnp.minimum(pl.cdiv(jnp.minimum(inputs.sink_tokens[0], kv_len), tile_len), first)


def _capped(score: Float[Array, "M B"], softcap: float) -> Float[Array, "M B"]:
    return jnp.tanh(score / softcap) * (softcap * LOG2_E)


def start(member: Int[Array, " M"], head_dim: int) -> Softmax:
    """The softmax before any key, for M queries with outputs of head_dim numbers."""
    top = jnp.full(member.shape, _LEAST_TOP, jnp.float32)
    return Softmax(top, jnp.zeros_like(top), jnp.zeros((*member.shape, head_dim), jnp.float32))


def normalised(found: Softmax) -> Float[Array, "M H"]:
    """The attention: the weighted values over the sum of the weights; zeros for a query that has seen no key."""
    return found.out * jnp.where(found.total > 0, 1.0 / found.total, 0.0)[:, None]


def tile_len(largest: int, pages: Any) -> int:
    """Positions or queries of a tile: `largest`, or fewer where the heads of these pages exceed _HEAD_BYTES."""
    head_bytes = max(SMALLEST_DOT, pl.next_power_of_2(pages.shape[3])) * pages.dtype.itemsize
    return max(SMALLEST_DOT, min(largest, largest * _HEAD_BYTES // head_bytes))


def head_dims(head_dim: int) -> tuple[Int[Array, "1 H"], Array]:
    """Indices along a head, padded to a power of two, and a mask of those that exist."""
    dims = jnp.arange(max(SMALLEST_DOT, pl.next_power_of_2(head_dim)))[None, :]
    return dims, dims < head_dim
