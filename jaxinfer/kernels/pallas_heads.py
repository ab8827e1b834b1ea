"""What stands between the fused QKV product and attention, as one Pallas kernel: norms of heads, rotation, cache write.

Owns: the kernel. layers/attention.py does the same step by step, for other backends and as the oracle of this one: on a
GPU every step is a kernel of its own, and for few tokens a kernel costs its launch, 1.5 to 3.5 us each on an H100.
Does not know: what attends.
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
"""Tokens of a block at most."""
_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)


class HeadNorm(NamedTuple):
    """Norms of every query and every key head by its root mean square, as layers/norm.py's RMSNorm.

    Args:
        query_weight, key_weight: float[H].
        eps: added to the mean square.
        offset: added to the weights.
    """

    query_weight: Float[Array, " H"]
    key_weight: Float[Array, " H"]
    eps: float
    offset: float


class _Inputs(NamedTuple):
    """The operands of the kernel that it reads: arrays outside of it, references inside."""

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
        pages, offsets: int32[T], where each token's key and value go.
        rotary: cos and sin of every token's angles; the pairs (i, i + I) of a head are rotated, the rest is not. None
            rotates nothing.
        norm: None for no norms.

    Returns:
        The queries, and both arrays of pages with the new keys and values; donated pages are written in place.
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


# Jitted on its own, so that the layers of a model share what is traced and lowered.
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
    """One head of a tile of tokens."""
    num_tokens, _, head_dim = inputs.heads.shape
    num_kv_heads = key_ref.shape[1]
    head = pl.program_id(1)
    token = (pl.program_id(0) * token_tile + jnp.arange(token_tile))[:, None]  # [B, 1]
    rotary = inputs.rotary or ()
    num_pairs = rotary[0].shape[1] if rotary else 0
    # A head in up to three pieces: the first and the second of every pair, and what is not rotated.
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
            # Rounded where RMSNorm rounds: behind the weight with an offset, before it without.
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
    """Consecutive dimensions of a head, padded to a power of two: int32[1, D], and which of [B, D] exist."""

    dims: Int[Array, "1 D"]
    mask: Array

    @classmethod
    def of(cls, start: int, size: int, is_token: Array) -> _Piece:
        """Some dimensions of the tokens that exist."""
        dims = start + jnp.arange(pl.next_power_of_2(size))[None, :]
        return cls(dims, is_token & (dims < start + size))


def _rounded(x: Float[Array, "B D"], dtype: Any) -> Float[Array, "B D"]:
    """As if stored in a dtype and read again."""
    return x.astype(dtype).astype(jnp.float32)
