"""A linear layer for a few rows on a GPU, with what follows it, as one Pallas kernel.

A product of a few rows takes the time of reading its weights. A block of the kernel takes some output features and all
rows, and streams its weights through shared memory. Bias and gate would each be a kernel that costs little but its
launch, so the same kernel computes them.

Measured on an H100 with eight layers of the 8B shape: a step takes 1.825 ms with 8 rows and 2.163 ms with 32; with
XLA's products, split along their inputs by XLA, 1.845 and 2.188 ms.

Owns: the kernel, and how the output features are cut into blocks. layers/linear.py has the same steps one by one, for
other backends and as this kernel's oracle; pallas_gemv.py has a kernel for a single row.
Does not know: which layer calls it.
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
from jaxtyping import Array, Float, Num

_SMALLEST_DOT = 16  # rows and columns of the smallest matrix product that Triton supports
_MANY_FEATURES = 4096
"""Output features from which on blocks of 32 of them are enough to fill an H100, which has 132 multiprocessors."""
_SHARED_BYTES = 96 * 1024
"""Shared memory of a block at most: two blocks for each multiprocessor of an H100, one for those of smaller GPUs."""
_MOST_STAGES, _INNER = 6, 256
"""Stages, and input features read at a time, at most. In the measurement above, tiles of 32 features and 128 inputs in
6 stages took 2.284 ms with 32 rows, tiles of 64 features and 128 inputs in 5 stages 2.222 ms."""


class _Inputs(NamedTuple):
    """The operands of the kernel: arrays where it is called, references inside it."""

    x: Any
    weight: Any
    scale: Any
    bias: Any


class Tiles(NamedTuple):
    """How a product is cut.

    Args:
        out: output features of a block; twice as many rows of weights with a gate.
        inner: input features that a block reads at a time.
        stages: tiles that are being read or multiplied.
    """

    out: int
    inner: int
    stages: int


def few_rows_linear(
    x: Float[Array, "T I"],
    weight: Num[Array, "O I"],
    scale: Float[Array, " O"] | None = None,
    *,
    bias: Float[Array, " O"] | None = None,
    gate: Callable[[Array], Array] | None = None,
) -> Float[Array, "T F"]:
    """Computes y = x @ weight.T + bias; a gate turns y into gate(first half) * second half.

    Args:
        x: float[T, I].
        weight: float[O, I], or int8.
        scale: float32[O], by which rows of int8 weights are multiplied; None for other weights.
        bias: added to the product; None for none.
        gate: activation of the first half of y, which then multiplies the second half; None leaves y as it is.

    Returns:
        Float[T, F] in x's dtype, where F is O, or O / 2 with a gate. Sums are float32.
    """
    inputs = _Inputs(x, weight, scale, bias)
    tiles = _choose_tiles(
        x.shape[0],
        weight.shape[0],
        num_halves=1 if gate is None else 2,
        itemsizes=(x.dtype.itemsize, weight.dtype.itemsize),
    )
    run = functools.partial(_run, gate=gate, tiles=tiles)
    return lax.platform_dependent(
        inputs, cpu=functools.partial(run, interpret=True), default=functools.partial(run, interpret=False)
    )


def _choose_tiles(num_rows: int, num_out: int, *, num_halves: int, itemsizes: tuple[int, int]) -> Tiles:
    """Tiles that keep many weights on their way; itemsizes are bytes of an input and of a weight.

    Triton keeps one tile less in shared memory than it has stages.
    """
    out, inner = (32 if num_out >= _MANY_FEATURES else 16), _INNER
    input_bytes, weight_bytes = itemsizes
    tile_bytes = inner * (weight_bytes * num_halves * out + input_bytes * _padded(num_rows))
    while 2 * tile_bytes > _SHARED_BYTES:
        inner, tile_bytes = inner // 2, tile_bytes // 2
    return Tiles(out, inner, min(_MOST_STAGES, 1 + _SHARED_BYTES // tile_bytes))


def _padded(num_rows: int) -> int:
    return max(_SMALLEST_DOT, pl.next_power_of_2(num_rows))


# Jitted on its own, so that it is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("gate", "tiles", "interpret"))
def _run(
    inputs: _Inputs, *, gate: Callable[[Array], Array] | None, tiles: Tiles, interpret: bool
) -> Float[Array, "T F"]:
    num_out = inputs.weight.shape[0] // (1 if gate is None else 2)
    return pl.pallas_call(
        functools.partial(_kernel, gate=gate, tiles=tiles),
        grid=(pl.cdiv(num_out, tiles.out),),
        out_shape=jax.ShapeDtypeStruct((inputs.x.shape[0], num_out), inputs.x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=tiles.stages),
        interpret=interpret,
        name="few_rows_linear",
    )(inputs)


def _kernel(inputs: _Inputs, out_ref: Any, *, gate: Callable[[Array], Array] | None, tiles: Tiles) -> None:
    """One block: the next tiles.out output features of all rows."""
    (num_rows, num_in), num_out = inputs.x.shape, out_ref.shape[1]
    row = jnp.arange(_padded(num_rows))[None, :]  # [1, T]
    feature = (pl.program_id(0) * tiles.out + jnp.arange(tiles.out))[:, None]  # [O, 1]
    exists = feature < num_out
    starts = (0,) if gate is None else (0, num_out)
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if inputs.x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def add_inputs(step: Array, sums: list[Array]) -> list[Array]:
        place = step * tiles.inner + jnp.arange(tiles.inner)  # [I]
        is_inside = place < num_in
        x = plgpu.load(
            inputs.x.at[row, place[:, None]],  # [I, T]
            mask=is_inside[:, None] & (row < num_rows),
            other=0.0,
        )
        added = []
        for start, total in zip(starts, sums, strict=True):
            weight = plgpu.load(
                inputs.weight.at[start + feature, place[None, :]],
                mask=exists & is_inside[None, :],
                other=0.0,
                eviction_policy="evict_first",  # weights are read once; they must not push out what is read again
            )
            added.append(total + dot(weight.astype(x.dtype), x))
        return added

    zeros = jnp.zeros((tiles.out, row.shape[1]), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(num_in, tiles.inner), add_inputs, [zeros] * len(starts))

    def loaded(ref: Any) -> Float[Array, "O 1"]:
        return plgpu.load(ref, mask=exists, other=0.0).astype(jnp.float32)

    if inputs.scale is not None:
        sums = [total * loaded(inputs.scale.at[start + feature]) for start, total in zip(starts, sums, strict=True)]
    if inputs.bias is not None:
        sums = [total + loaded(inputs.bias.at[start + feature]) for start, total in zip(starts, sums, strict=True)]
    out = sums[0] if gate is None else gate(sums[0]) * sums[1]
    plgpu.store(out_ref.at[row, feature], out.astype(out_ref.dtype), mask=exists & (row < num_rows))
