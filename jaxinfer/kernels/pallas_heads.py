"""The steps between the fused QKV product and attention, as one Pallas kernel: head norms, rotation and cache write.

On a GPU each of these steps would be a kernel of its own; with few tokens, a kernel costs little but its launch, 1.5 to
3.5 us each on an H100.

Owns: the kernel. layers/attention.py has the same steps one by one, for other backends and as this kernel's oracle.
Does not know: how the queries attend afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_TOKEN_TILE = 16
"""The most tokens that one block computes."""
_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)


class HeadNorm(NamedTuple):
    """An RMSNorm (as in layers/norm.py) of every query head and one of every key head.

    Args:
        query_weight, key_weight: float[H], shared by all heads.
        eps: added to the mean square.
        offset: added to the weights.
    """

    query_weight: Float[Array, " H"]
    key_weight: Float[Array, " H"]
    eps: float
    offset: float


class _Inputs(NamedTuple):
    """The operands that the kernel only reads: arrays where it is called, references inside it."""

    heads: Any
    pages: Any
    offsets: Any
    rotary: Any
    weights: Any


def rotate_and_write(
    heads: Float[Array, "T J H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    *,
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
    rotary: tuple[Float[Array, "T I"], Float[Array, "T I"]] | None,
    norm: HeadNorm | None,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K C H"], Float[Array, "P K C H"]]:
    """Norms and rotates queries and keys, and writes keys and values to the cache.

    Args:
        heads: the query heads of every token, then its key heads, then its value heads; J = N + 2 K.
        k_pages, v_pages: the cache.
        pages, offsets: int32[T], the page and the offset in it where each token's key and value are stored.
        rotary: cos and sin of every token's angles. Dimensions i and i + I of a head are rotated as a pair, for i < I;
            those from 2 I on are left alone. None for no rotation.
        norm: of the query and key heads; None for none.

    Returns:
        The queries, and the pages of keys and of values with the new entries; donated pages are written in place.
    """
    eps, offset = (norm.eps, norm.offset) if norm is not None else (0.0, 0.0)
    weights = None if norm is None else (norm.query_weight, norm.key_weight)
    run = functools.partial(_run, eps=eps, offset=offset)
    return lax.platform_dependent(
        _Inputs(heads, pages, offsets, rotary, weights),
        k_pages,
        v_pages,
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )


# Jitted on its own, so that it is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def _run(
    inputs: _Inputs, k_pages: Array, v_pages: Array, *, eps: float, offset: float, interpret: bool
) -> tuple[Array, Array, Array]:
    num_tokens, num_parts, head_dim = inputs.heads.shape
    num_heads = num_parts - 2 * k_pages.shape[1]
    token_tile = min(pl.next_power_of_2(num_tokens), _TOKEN_TILE)
    num_inputs = len(jax.tree.leaves(inputs))
    queries, k_pages, v_pages = pl.pallas_call(
        functools.partial(_kernel, num_heads=num_heads, token_tile=token_tile, eps=eps, offset=offset),
        grid=(pl.cdiv(num_tokens, token_tile), num_parts),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), inputs.heads.dtype),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        input_output_aliases={num_inputs: 1, num_inputs + 1: 2},
        compiler_params=_PARAMS,
        interpret=interpret,
        name="rotate_and_write",
    )(inputs, k_pages, v_pages)
    return queries, k_pages, v_pages


def _kernel(
    inputs: _Inputs,
    _: Any,
    __: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *,
    num_heads: int,
    token_tile: int,
    eps: float,
    offset: float,
) -> None:
    """One block: one query, key or value head of a tile of tokens."""
    num_tokens, _, head_dim = inputs.heads.shape
    num_kv_heads = key_ref.shape[1]
    head = pl.program_id(1)
    token = (pl.program_id(0) * token_tile + jnp.arange(token_tile))[:, None]  # [B, 1]
    rotary = inputs.rotary or ()
    num_pairs = rotary[0].shape[1] if rotary else 0
    # A head has up to three pieces: the first members of all pairs, the second members, and what is not rotated.
    starts = [(0, num_pairs), (num_pairs, num_pairs), (2 * num_pairs, head_dim - 2 * num_pairs)]
    pieces = [_Piece.of(start, size, token < num_tokens) for start, size in starts if size]
    parts = [
        plgpu.load(inputs.heads.at[token, head, piece.dims], mask=piece.mask, other=0.0).astype(jnp.float32)
        for piece in pieces
    ]
    dtype = inputs.heads.dtype
    is_value = head >= num_heads + num_kv_heads
    if inputs.weights is not None:
        squares = sum(jnp.sum(part * part, axis=1, keepdims=True) for part in parts)
        scale = lax.rsqrt(squares / head_dim + eps)  # [B, 1]
        for i, piece in enumerate(pieces):
            query_weight, key_weight = (
                plgpu.load(ref.at[piece.dims], mask=piece.dims < head_dim, other=0.0) for ref in inputs.weights
            )
            weight = jnp.where(head < num_heads, query_weight, key_weight).astype(jnp.float32)
            # Rounded where RMSNorm rounds: after the weight with an offset, before it without.
            normed = parts[i] * scale
            normed = normed * (weight + offset) if offset else _rounded(normed, dtype) * weight
            parts[i] = jnp.where(is_value, parts[i], _rounded(normed, dtype))
    if num_pairs:
        pair = pieces[0]
        cos, sin = (_rounded(plgpu.load(ref.at[token, pair.dims], mask=pair.mask, other=0.0), dtype) for ref in rotary)
        first, second = parts[:2]
        parts[0] = jnp.where(is_value, first, first * cos - second * sin)
        parts[1] = jnp.where(is_value, second, second * cos + first * sin)
    page, place = (
        plgpu.load(ref.at[token], mask=token < num_tokens, other=0) for ref in (inputs.pages, inputs.offsets)
    )

    def store(ref: Any, *where: Any) -> None:
        for piece, part in zip(pieces, parts, strict=True):
            plgpu.store(ref.at[(*where, piece.dims)], part.astype(dtype), mask=piece.mask)

    @pl.when(head < num_heads)
    def _store_query() -> None:
        store(query_ref, token, head)

    @pl.when((head >= num_heads) & ~is_value)
    def _store_key() -> None:
        store(key_ref, page, head - num_heads, place)

    @pl.when(is_value)
    def _store_value() -> None:
        store(value_ref, page, head - num_heads - num_kv_heads, place)


class _Piece(NamedTuple):
    """Consecutive dimensions of a head for B tokens: their indices, padded to a power of two, and a mask [B, D]."""

    dims: Int[Array, "1 D"]
    mask: Array

    @classmethod
    def of(cls, start: int, size: int, is_token: Array) -> _Piece:
        """The `size` dimensions from `start` on; the mask leaves out padding and rows that are no token."""
        dims = start + jnp.arange(pl.next_power_of_2(size))[None, :]
        return cls(dims, is_token & (dims < start + size))


def _rounded(x: Float[Array, "B D"], dtype: Any) -> Float[Array, "B D"]:
    """float32 values rounded as if they had been stored in a dtype and read again."""
    return x.astype(dtype).astype(jnp.float32)
