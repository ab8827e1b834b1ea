"""A linear layer for few rows on a GPU, as one Pallas kernel with what stands in front of it and behind it.

Owns: the kernel. layers/linear.py does the same step by step, for other numbers of rows and as the oracle of this one.
Does not know: which layer calls.

With few rows a product is the reading of its weights, and every kernel beside it costs its launch: the norm in front,
the gate, the addition to the residual stream. All of them fit into the kernel that reads the weights. The norm's scale
is one number a row, so that it is multiplied in at the end, and one pass over the input is enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

MAX_ROWS = 8
"""Rows up to which the kernel is used; beyond, XLA's own products are as fast and better tuned."""
_SMALLEST_DOT = 16  # rows of the smallest matrix product that Triton has


class RowNorm(NamedTuple):
    """A norm of every row by its root mean square, as layers/norm.py's RMSNorm.

    Args:
        weight: float[I].
        eps: added to the mean square.
        offset: added to the weights.
    """

    weight: Float[Array, " I"]
    eps: float
    offset: float


class _Inputs(NamedTuple):
    """The operands of the kernel: arrays outside of it, references inside."""

    x: Any
    weight: Any
    norm_weight: Any
    bias: Any
    residual: Any


class _Tile(NamedTuple):
    """What a block computes at a time: output features and input features, and how it is compiled."""

    num_out: int
    num_in: int
    params: plgpu.CompilerParams

    @classmethod
    def of(cls, num_rows: int) -> _Tile:
        """Measured on an H100 with the products of an 8B model, 0.91 to 1.02 of XLA's time without its neighbours."""
        if num_rows == 1:
            return cls(4, 1024, plgpu.CompilerParams(num_warps=4, num_stages=3))
        return cls(16, 256, plgpu.CompilerParams(num_warps=4, num_stages=4))


def few_rows_linear(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    *,
    norm: RowNorm | None = None,
    bias: Float[Array, " O"] | None = None,
    gate: Callable[[Array], Array] | None = None,
    residual: Float[Array, "T F"] | None = None,
) -> Float[Array, "T F"]:
    """residual + norm(x) @ weight.T + bias, or with a gate residual + gate(first half) * second half.

    Args:
        x: float[T, I], few rows.
        weight: float[O, I]; with a gate, the rows of both halves one after the other.
        norm: of x; None for none.
        bias: added to the product.
        gate: activation of the first half of the product, which multiplies the second.
        residual: added at the end.

    Returns:
        Float[T, F] in x's dtype, F = O, or O / 2 with a gate; sums are float32.
    """
    inputs = _Inputs(x, weight, None if norm is None else norm.weight, bias, residual)
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    run = functools.partial(_run, gate=gate, eps=eps, offset=offset)
    return lax.platform_dependent(
        inputs, cpu=functools.partial(run, interpret=True), default=functools.partial(run, interpret=False)
    )


# Jitted on its own, so that the layers of a model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames=("gate", "eps", "offset", "interpret"))
def _run(
    inputs: _Inputs, *, gate: Callable[[Array], Array] | None, eps: float, offset: float, interpret: bool
) -> Array:
    num_rows, tile = inputs.x.shape[0], _Tile.of(inputs.x.shape[0])
    num_out = inputs.weight.shape[0] // (1 if gate is None else 2)
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, gate=gate, eps=eps, offset=offset),
        grid=(pl.cdiv(num_out, tile.num_out),),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), inputs.x.dtype),
        compiler_params=tile.params,
        interpret=interpret,
        name="few_rows_linear",
    )(inputs)


def _kernel(
    inputs: _Inputs,
    out_ref: Any,
    *,
    tile: _Tile,
    gate: Callable[[Array], Array] | None,
    eps: float,
    offset: float,
) -> None:
    """Some output features of all rows."""
    (num_rows, num_in), num_out = inputs.x.shape, out_ref.shape[1]
    row = jnp.arange(1 if num_rows == 1 else max(_SMALLEST_DOT, pl.next_power_of_2(num_rows)))  # [T]
    feature = pl.program_id(0) * tile.num_out + jnp.arange(tile.num_out)  # [O]
    starts = (0,) if gate is None else (0, num_out)
    dtype = inputs.x.dtype

    def add_inputs(step: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        sums, squares = carry
        place = (step * tile.num_in + jnp.arange(tile.num_in))[None, :]  # [1, I]
        mask = place < num_in
        x = plgpu.load(inputs.x.at[row[:, None], place], mask=(row < num_rows)[:, None] & mask, other=0.0)
        if inputs.norm_weight is not None:
            scale = plgpu.load(inputs.norm_weight.at[place], mask=mask, other=0.0).astype(jnp.float32) + offset
            wide = x.astype(jnp.float32)
            squares += wide * wide
            x = (wide * scale).astype(dtype)
        added = []
        for start, total in zip(starts, sums, strict=True):
            where = (start + feature[:, None], place)
            exists = (feature < num_out)[:, None] & mask
            # Weights are read once a step: they must not push out of the cache what is read again.
            weight = plgpu.load(inputs.weight.at[where], mask=exists, other=0.0, eviction_policy="evict_first")
            added.append(total + _products(weight, x))
        return added, squares

    width = tile.num_in if num_rows == 1 else row.shape[0]
    zeros = [jnp.zeros((tile.num_out, width), jnp.float32) for _ in starts]
    squares = jnp.zeros((row.shape[0], tile.num_in), jnp.float32)
    sums, squares = lax.fori_loop(0, pl.cdiv(num_in, tile.num_in), add_inputs, (zeros, squares))
    if num_rows == 1:
        sums = [jnp.sum(total, axis=1, keepdims=True) for total in sums]  # [O, T] from here on
    if inputs.norm_weight is not None:
        scale = lax.rsqrt(jnp.sum(squares, axis=1) / num_in + eps)[None, :]
        sums = [total * scale for total in sums]
    if inputs.bias is not None:
        places = [start + feature for start in starts]
        biases = [plgpu.load(inputs.bias.at[place], mask=feature < num_out, other=0.0) for place in places]
        sums = [total + bias.astype(jnp.float32)[:, None] for total, bias in zip(sums, biases, strict=True)]
    out = sums[0] if gate is None else gate(sums[0]) * sums[1]
    mask = (row < num_rows)[None, :] & (feature < num_out)[:, None]
    where = (row[None, :], feature[:, None])
    if inputs.residual is not None:
        out += plgpu.load(inputs.residual.at[where], mask=mask, other=0.0).astype(jnp.float32)
    plgpu.store(out_ref.at[where], out.astype(dtype), mask=mask)


def _products(weight: Float[Array, "O I"], x: Float[Array, "T I"]) -> Float[Array, "O J"]:
    """What a tile adds: of several rows the product [O, T], of one row the terms [O, I] that are summed at the end."""
    if x.shape[0] == 1:
        return weight.astype(jnp.float32) * x.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(weight, x, dims, precision=precision, preferred_element_type=jnp.float32)
