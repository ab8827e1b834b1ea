"""Paged attention for GPUs: three Pallas kernels, compiled through Triton.

Owns: how the work of an attention is cut into thread blocks. On a CPU the same kernels run in Pallas' interpreter, for
tests.
Does not know: what a block does with a tile of keys (kernels/pallas_tiles.py does), when this backend is chosen
(kernels/paged_attention.py does).

The decode kernel takes rows of fewer than _MIN_PREFILL_QUERIES queries, as in decoding. Its grid has one block for each
row, kv head and split: the keys of a row are split among several blocks, so that even a single long row fills the whole
GPU, and the combine kernel then adds up the splits' results.

The prefill kernel takes longer rows. Its grid has one block for each query head and tile of up to _QUERY_TILE queries.
A tile may hold several rows; neighbouring rows with the same sequence_id are pieces of one prompt, whose pages they
read together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxinfer.kernels import pallas_tiles
from jaxinfer.kernels.pallas_tiles import Inputs, Settings
from jaxinfer.kernels.segment import Segment

_DECODE_TILE, _PREFILL_TILE = 64, 64
"""Positions whose keys a block of each kernel loads at once; fewer where a head is large (pallas_tiles)."""
# Measured on an H100 with the heads of the 8B shape. A prompt of 8k tokens: 1.51 ms a layer with these, 1.59 with 2
# stages, 1.54 with 4, 1.93 with 8 warps, 1.59 if a head's tiles run one after the other instead of all heads' longest
# first; cuDNN takes 1.06 where keys lie in one piece. 32 and 128 decode rows at 1k: 61.5 and 204.9 us with these, 62.3
# and 205.7 with 2 warps, 63.7 and 211.8 with 8, 66.2 and 212.8 with tiles of 32 keys and 4 stages.
_DECODE_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)
_PREFILL_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)
_COMBINE_PARAMS = plgpu.CompilerParams(num_warps=2, num_stages=1)
_QUERY_TILE = 128
"""Queries that a block of the prefill kernel computes; fewer where a head is large (pallas_tiles)."""
_MIN_PREFILL_QUERIES = 16
"""Rows of fewer queries go to the decode kernel."""
_MIN_BLOCKS = 264
"""Blocks that fill an H100, two for each of its 132 multiprocessors."""
_MAX_SPLIT = 8192
"""Positions that a split should not exceed, so that a long row among short ones is not computed by few blocks while the
rest of the GPU waits."""


def paged_attention_pallas(
    q: Float[Array, "R Q N H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    page_table: Int[Array, "R W"],
    kv_len: Int[Array, " R"],
    q_len: Int[Array, " R"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    sequence_id: Int[Array, " R"] | None = None,
) -> Float[Array, "R Q N H"]:
    """Attends with the decode kernel or, for rows of _MIN_PREFILL_QUERIES queries or more, with the prefill kernel.

    Args: as in `jaxinfer.kernels.paged_attention.paged_attention`.

    Returns:
        Float[R, Q, N, H] in q's dtype.

    Source: split keys as in Flash-Decoding (Dao et al. 2023), tiles of queries as in FlashAttention-2 (Dao 2023).
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    own = jnp.arange(num_rows, dtype=jnp.int32)
    segment = Segment(page_table, kv_len, q_len, own if sequence_id is None else sequence_id, num_queries=num_queries)
    tokens = q.reshape(num_rows * num_queries, num_heads, head_dim)
    return segmented_attention_pallas(
        tokens,
        k_pages,
        v_pages,
        [segment],
        scale=scale,
        window=window,
        sink_tokens=sink_tokens,
        softcap=softcap,
        sinks=sinks,
    ).reshape(q.shape)


def segmented_attention_pallas(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "T N H"]:
    """Attends segment by segment; the kernels of all segments read the same queries and write into the same result.

    Args: as in `jaxinfer.kernels.paged_attention.segmented_attention`, and the sinks of paged_attention.
    """
    has_sink_tokens = window is not None and not (isinstance(sink_tokens, int) and sink_tokens == 0)

    def attend(segment: Segment, start: int, out: Array | None) -> Float[Array, "T N H"]:
        inputs = Inputs(
            q=q,
            k_pages=k_pages,
            v_pages=v_pages,
            page_table=segment.page_table,
            kv_len=segment.kv_len,
            q_len=segment.q_len,
            sequence_id=segment.sequence_id,
            window=None if window is None else jnp.reshape(jnp.asarray(window, jnp.int32), (1,)),
            sink_tokens=jnp.reshape(jnp.asarray(sink_tokens, jnp.int32), (1,)) if has_sink_tokens else None,
            sinks=sinks,
        )
        run = functools.partial(
            _prefill if segment.num_queries >= _MIN_PREFILL_QUERIES else _decode,
            settings=Settings(start=start, num_queries=segment.num_queries, scale=scale, softcap=softcap),
        )
        return lax.platform_dependent(
            inputs, out, cpu=functools.partial(run, interpret=True), default=functools.partial(run, interpret=False)
        )

    out = attend(segments[0], 0, None)
    starts = accumulate(segment.num_tokens for segment in segments)
    for segment, start in zip(segments[1:], starts, strict=False):
        out = attend(segment, start, out)
    return out


def _result(inputs: Inputs, out: Array | None) -> dict[str, Any]:
    """Arguments of a pallas_call that returns the attention of all tokens, in which it writes its segment's.

    The first segment's kernel makes a new array (out is None), the next ones write into that of the one before.
    """
    num_operands = len(jax.tree.leaves(inputs))
    return {
        "out_shape": jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        "input_output_aliases": {} if out is None else {num_operands: 0},
    }


# _decode and _prefill are jitted on their own, so that they are traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("settings", "interpret"))
def _decode(inputs: Inputs, out: Array | None, *, settings: Settings, interpret: bool) -> Float[Array, "T N H"]:
    num_rows, num_heads, head_dim = inputs.page_table.shape[0], *inputs.q.shape[1:]
    num_kv_heads, page_size = inputs.k_pages.shape[1:3]
    num_splits = _num_splits(num_rows * num_kv_heads, inputs.page_table.shape[1] * page_size)
    call = functools.partial(
        pl.pallas_call,
        functools.partial(_decode_kernel, num_splits=num_splits, settings=settings),
        grid=(num_rows, num_kv_heads, num_splits),
        compiler_params=_DECODE_PARAMS,
        interpret=interpret,
        name="paged_attention_decode",
    )
    if num_splits == 1:
        return call(**_result(inputs, out))(inputs, out)
    num_queries = num_rows * settings.num_queries
    dims = (num_splits, num_queries, num_heads)
    shapes = [(*dims, head_dim), dims, dims]
    found = call(out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])(inputs, None)
    parts = tuple(found)
    return pl.pallas_call(
        functools.partial(_combine_kernel, start=settings.start),
        grid=(num_queries, num_heads),
        out_shape=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        input_output_aliases={} if out is None else {len(parts): 0},
        compiler_params=_COMBINE_PARAMS,
        interpret=interpret,
        name="paged_attention_combine",
    )(parts, out)


def _num_splits(num_blocks: int, max_len: int) -> int:
    """Splits of each row: enough to fill the GPU with blocks and to keep splits short, rounded to a power of two.

    Measured on an H100: 32 rows of the 8B shape take the same time with 1, 2 and 4 splits.

    Args:
        num_blocks: blocks without splits, rows times kv heads.
        max_len: positions of the longest row that the page table can hold.
    """
    wanted = max(_MIN_BLOCKS / num_blocks, max_len / _MAX_SPLIT, 1)
    return min(1 << round(math.log2(wanted)), 1 << int(math.log2(max(max_len // _DECODE_TILE, 1))))


def _decode_kernel(inputs: Inputs, _: Any, out_ref: Any, *stats: Any, num_splits: int, settings: Settings) -> None:
    """One block: all queries of one row, for one kv head, over one split of the row's keys.

    The M members of the block are (query, head) pairs, the heads of the kv head's group next to each other. With one
    split, out_ref takes the attention of the tokens. With several, out_ref and stats take the softmax of each split.
    """
    num_heads, head_dim = inputs.q.shape[1:]
    num_queries = settings.num_queries
    group = num_heads // inputs.k_pages.shape[1]
    row, kv_head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_len, q_len = inputs.kv_len[row], inputs.q_len[row]

    member = jnp.arange(max(pallas_tiles.SMALLEST_DOT, pl.next_power_of_2(num_queries * group)))  # [M]
    query, head = lax.div(member, group), kv_head * group + lax.rem(member, group)
    is_query = member < num_queries * group
    query_position = jnp.where(is_query & (query < q_len), kv_len - q_len + query, -1)
    dims, inside = pallas_tiles.head_dims(head_dim)
    mask = is_query[:, None] & inside
    number = row * num_queries + query  # among the segment's queries
    token = settings.start + number
    q = plgpu.load(inputs.q.at[token[:, None], head[:, None], dims], mask=mask, other=0.0)

    tile_len = pallas_tiles.tile_len(_DECODE_TILE, inputs.k_pages)
    first, end, seen_from = 0, pl.cdiv(kv_len, tile_len), 0
    if inputs.window is not None:
        seen_from = pallas_tiles.seen_from(inputs, kv_len - q_len)
        first = lax.div(seen_from, tile_len)
    share = pl.cdiv(end - first, num_splits)
    own_first = first + split * share
    found = pallas_tiles.start(member, q.shape[1])
    if inputs.sinks is not None:  # the first split starts with the sink, as if it were its first key
        sink = plgpu.load(inputs.sinks.at[head], mask=is_query, other=0.0).astype(jnp.float32) * pallas_tiles.LOG2_E
        found = found._replace(
            top=jnp.where(split == 0, sink, found.top), total=jnp.where(split == 0, 1.0, found.total)
        )
    attend = functools.partial(
        pallas_tiles.attend,
        inputs,
        q=q,
        query_position=query_position,
        row=row,
        kv_head=kv_head,
        kv_len=kv_len,
        seen_from=seen_from,
        tile_len=tile_len,
        settings=settings,
    )
    if inputs.sink_tokens is not None:
        num_sinks = jnp.where(split == 0, pallas_tiles.num_sink_tiles(inputs, kv_len, first, tile_len), 0)
        found = attend(found, tiles=(0, num_sinks))
    found = attend(found, tiles=(own_first, jnp.minimum(own_first + share, end)))
    if num_splits == 1:
        out = pallas_tiles.normalised(found).astype(out_ref.dtype)
        plgpu.store(out_ref.at[token[:, None], head[:, None], dims], out, mask=mask)
        return
    plgpu.store(out_ref.at[split, number[:, None], head[:, None], dims], found.out, mask=mask)
    for ref, value in zip(stats, (found.top, found.total), strict=True):
        plgpu.store(ref.at[split, number, head], value, mask=is_query)


def _combine_kernel(parts: tuple[Any, Any, Any], _: Any, out_ref: Any, *, start: int) -> None:
    """One block: adds up the splits' results for one query of one head."""
    part_ref, top_ref, total_ref = parts
    num_splits, *_, head_dim = part_ref.shape
    number, head, split = pl.program_id(0), pl.program_id(1), jnp.arange(num_splits)
    dims, inside = pallas_tiles.head_dims(head_dim)
    top = plgpu.load(top_ref.at[split, number, head])  # [S]
    share = jnp.exp2(top - jnp.max(top))
    total = jnp.sum(plgpu.load(total_ref.at[split, number, head]) * share)
    mask = inside & (split >= 0)[:, None]
    part = plgpu.load(part_ref.at[split[:, None], number, head, dims], mask=mask, other=0.0)  # [S, H]
    out = jnp.sum(part * share[:, None], axis=0) * jnp.where(total > 0, 1.0 / total, 0.0)
    plgpu.store(out_ref.at[start + number, head, dims[0]], out.astype(out_ref.dtype), mask=inside[0])


@functools.partial(jax.jit, static_argnames=("settings", "interpret"))
def _prefill(inputs: Inputs, out: Array | None, *, settings: Settings, interpret: bool) -> Float[Array, "T N H"]:
    num_rows, num_heads = inputs.page_table.shape[0], inputs.q.shape[1]
    row_len = pl.next_power_of_2(settings.num_queries)
    rows_per_tile = max(
        1, min(pallas_tiles.tile_len(_QUERY_TILE, inputs.k_pages) // row_len, pl.next_power_of_2(num_rows))
    )
    return pl.pallas_call(
        functools.partial(_prefill_kernel, row_len=row_len, rows_per_tile=rows_per_tile, settings=settings),
        grid=(num_heads, pl.cdiv(num_rows, rows_per_tile)),
        compiler_params=_PREFILL_PARAMS,
        interpret=interpret,
        name="paged_attention_prefill",
        **_result(inputs, out),
    )(inputs, out)


def _prefill_kernel(
    inputs: Inputs,
    _: Any,
    out_ref: Any,
    *,
    row_len: int,
    rows_per_tile: int,
    settings: Settings,
) -> None:
    """One block: one query head of a tile of rows, of row_len queries each. Rows of one sequence attend together."""
    num_rows, (num_heads, head_dim) = inputs.page_table.shape[0], inputs.q.shape[1:]
    tile_len = pallas_tiles.tile_len(_PREFILL_TILE, inputs.k_pages)
    # Later tiles of a prompt attend to more keys and take longer, so those of all heads begin first.
    head, tile = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    kv_head = lax.div(head, num_heads // inputs.k_pages.shape[1])
    member = jnp.arange(rows_per_tile * row_len)  # [M]
    local_row, query = lax.div(member, row_len), lax.rem(member, row_len)
    row = tile * rows_per_tile + local_row
    is_row = row < num_rows
    kv_len, q_len, sequence_id = (
        plgpu.load(ref.at[row], mask=is_row, other=0) for ref in (inputs.kv_len, inputs.q_len, inputs.sequence_id)
    )
    query_position = jnp.where(query < q_len, kv_len - q_len + query, -1)
    dims, inside = pallas_tiles.head_dims(head_dim)
    token = (settings.start + row * settings.num_queries + query)[:, None]
    mask = inside & (is_row & (query < settings.num_queries))[:, None]
    q = plgpu.load(inputs.q.at[token, head, dims], mask=mask, other=0.0)
    found = pallas_tiles.start(member, q.shape[1])
    if inputs.sinks is not None:
        sink = inputs.sinks[head].astype(jnp.float32) * pallas_tiles.LOG2_E
        found = found._replace(top=jnp.full_like(found.top, sink), total=jnp.ones_like(found.total))

    def attend_sequence(number: Array, found: pallas_tiles.Softmax) -> pallas_tiles.Softmax:
        """Attends with all rows of one sequence: that of row `number`, if the row is its sequence's first in the tile.

        For any other row the ranges of key tiles are empty, as its sequence's first row has done the work.
        """
        own_row = jnp.minimum(tile * rows_per_tile + number, num_rows - 1)
        mine = (sequence_id == inputs.sequence_id[own_row]) & (q_len > 0)
        is_first = jnp.min(jnp.where(mine, local_row, rows_per_tile)) == number
        own_len = jnp.max(jnp.where(mine, kv_len, 0))
        own_position = jnp.where(mine, query_position, -1)
        end = jnp.where(is_first, pl.cdiv(own_len, tile_len), 0)
        earliest = jnp.min(jnp.where(own_position >= 0, own_position, own_len))
        attend = functools.partial(
            pallas_tiles.attend,
            inputs,
            q=q,
            query_position=own_position,
            row=own_row,
            kv_head=kv_head,
            kv_len=own_len,
            tile_len=tile_len,
            settings=settings,
        )
        if inputs.window is not None:
            seen_from = pallas_tiles.seen_from(inputs, earliest)
            first = lax.div(seen_from, tile_len)
            if inputs.sink_tokens is not None:
                num_sinks = jnp.where(is_first, pallas_tiles.num_sink_tiles(inputs, own_len, first, tile_len), 0)
                found = attend(found, tiles=(0, num_sinks), seen_from=seen_from)
            return attend(found, tiles=(first, end), seen_from=seen_from)
        # Where all queries of the tile are this sequence's, the tiles of keys that all of them see (most of a long
        # prompt) need no mask.
        num_seen = jnp.where(is_first & (jnp.min(own_position) >= 0), lax.div(earliest + 1, tile_len), 0)
        found = attend(found, tiles=(0, num_seen), masked=False)
        return attend(found, tiles=(num_seen, end))

    found = lax.fori_loop(0, rows_per_tile, attend_sequence, found)
    plgpu.store(out_ref.at[token, head, dims], pallas_tiles.normalised(found).astype(out_ref.dtype), mask=mask)
