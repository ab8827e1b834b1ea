"""The parts of sampling that XLA would turn into many GPU kernels, as Pallas kernels: ranking and threshold search.

Owns: the kernels. sampling/threshold.py and sampling/top_values.py have the same steps in plain JAX, for other backends
and as their oracle.
Does not know: what the values mean, and that the vocabulary is spread over several devices.
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
from jaxtyping import Array, Float, Int

_RANK_TILE = 128
"""Values that a block of the ranking kernel ranks, and with how many others it compares them at a time."""
_RANK_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)

_DIGIT_BITS = 4
_NUM_DIGITS = 8
"""Digits of a depth. It has 31 bits, so the first digit has three."""
_NUM_SUMS = 1 << _DIGIT_BITS
_INFINITE_DEPTH = 0x7F800000
_SEARCH_TILE = 256
"""Values that a block of the search compares with its trials at a time."""
_SEARCH_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)
_MIN_BLOCKS = 264
"""Blocks that fill an H100, two for each of its 132 multiprocessors."""


class _SearchInputs(NamedTuple):
    """The operands of one pass: arrays where it is called, references inside it.

    Args:
        z, floor, target: as largest_threshold's.
        bound: int32[R], the depth as far as it was decided before the last pass.
        sums: float32[R, B, S], what the last pass found, in B parts.
        digit: int32[1], the number of this pass.
    """

    z: Any
    floor: Any
    target: Any
    bound: Any
    sums: Any
    digit: Any


def best_first(
    values: Float[Array, "R G C"], groups: Int[Array, "R G"] | None, *, count: int
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The `count` largest values with their ids, best first, the lowest id first on ties.

    A value's place is the number of better ones, which takes J * J comparisons for the J = G * C values of a row; J
    should not exceed a few thousand.

    Args:
        values: float32[R, G, C], not NaN, J >= count; member c of group g has the id groups[g] * C + c.
        groups: int32[R, G], the numbers of the groups, those of a row all different; None for 0, 1, 2, ...
    """
    run = functools.partial(_rank, count=count)
    return lax.platform_dependent(
        values, groups, cpu=functools.partial(run, interpret=True), default=functools.partial(run, interpret=False)
    )


@functools.partial(jax.jit, static_argnames=("count", "interpret"))
def _rank(values: Array, groups: Array | None, *, count: int, interpret: bool) -> tuple[Array, Array]:
    num_rows, num_groups, group_size = values.shape
    found = pl.pallas_call(
        functools.partial(_rank_kernel, group_size=group_size),
        grid=(num_rows, pl.cdiv(num_groups * group_size, _RANK_TILE)),
        out_shape=[jax.ShapeDtypeStruct((num_rows, count), dtype) for dtype in (values.dtype, jnp.int32)],
        compiler_params=_RANK_PARAMS,
        interpret=interpret,
        name="best_first",
    )((values.reshape(num_rows, -1), groups))
    return found[0], found[1]


def _rank_kernel(inputs: tuple[Any, Any], best_ref: Any, best_ids_ref: Any, *, group_size: int) -> None:
    """One block: finds the places of the next _RANK_TILE values of a row, and stores those that are among the best."""
    values, groups = inputs
    num_values, count = values.shape[1], best_ref.shape[1]
    row = pl.program_id(0)

    def loaded(tile: Any) -> tuple[Array, Array, Array]:
        place = tile * _RANK_TILE + jnp.arange(_RANK_TILE)
        there = place < num_values
        value, token_id = plgpu.load(values.at[row, place], mask=there, other=-jnp.inf), place
        if groups is not None:
            group = plgpu.load(groups.at[row, lax.div(place, group_size)], mask=there, other=0)
            token_id = group * group_size + lax.rem(place, group_size)
        return value, token_id, there

    value, own_id, there = loaded(pl.program_id(1))

    def add_better(tile: Array, num_better: Array) -> Array:
        other, other_id, exists = loaded(tile)
        wins = other[None, :] > value[:, None]
        ties = (other[None, :] == value[:, None]) & (other_id[None, :] < own_id[:, None])
        return num_better + jnp.sum(((wins | ties) & exists[None, :]).astype(jnp.int32), axis=1)

    place = lax.fori_loop(0, pl.cdiv(num_values, _RANK_TILE), add_better, jnp.zeros(_RANK_TILE, jnp.int32))
    is_best = there & (place < count)
    plgpu.store(best_ref.at[row, place], value, mask=is_best)
    plgpu.store(best_ids_ref.at[row, place], own_id, mask=is_best)


def largest_threshold(
    z: Float[Array, "R V"],
    *,
    floor: Float[Array, " R"],
    target: Float[Array, " R"],
    by_mass: bool,
    over_shards: Callable[[Array], Array],
) -> Float[Array, " R"]:
    """The largest t <= 0 for which the values z >= t weigh enough; -inf if none does.

    The search is a radix search for the depth of t, which is the bits of -t read as an integer: they order the values
    from the best down. It takes _NUM_DIGITS passes and one more for the last digit. Each pass is one kernel: its blocks
    take the digit before from what the last pass found, and then sum, for each value that this pass's digit may have,
    the weight of all that lie less deep.

    Args:
        z: float32[R, V], at most 0.
        floor: float32[R]; values below it weigh nothing.
        target: float32[R].
        by_mass: if True, each value weighs exp(z) and the target is a share of the weight of all; else each value
            weighs 1 and the target is a number of values.
        over_shards: adds up an array over all slices of the vocabulary.
    """
    num_rows, num_values = z.shape
    num_blocks = min(pl.cdiv(_MIN_BLOCKS, num_rows), pl.cdiv(num_values, _SEARCH_TILE))
    bound, sums = jnp.zeros(num_rows, jnp.int32), jnp.zeros((num_rows, num_blocks, _NUM_SUMS), jnp.float32)
    run = functools.partial(_search, by_mass=by_mass)
    for digit in range(_NUM_DIGITS + 1):
        bound, found = lax.platform_dependent(
            _SearchInputs(z, floor, target, bound, sums, jnp.full(1, digit, jnp.int32)),
            cpu=functools.partial(run, interpret=True),
            default=functools.partial(run, interpret=False),
        )
        sums = over_shards(found)
    return -lax.bitcast_convert_type(jnp.minimum(bound, _INFINITE_DEPTH), jnp.float32)


# Jitted on its own, so that it is traced and lowered once for all passes.
@functools.partial(jax.jit, static_argnames=("by_mass", "interpret"))
def _search(inputs: _SearchInputs, *, by_mass: bool, interpret: bool) -> tuple[Array, Array]:
    num_rows, num_blocks, _ = inputs.sums.shape
    found = pl.pallas_call(
        functools.partial(_search_kernel, by_mass=by_mass),
        grid=(num_rows, num_blocks),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.bound, inputs.sums)],
        compiler_params=_SEARCH_PARAMS,
        interpret=interpret,
        name="threshold_search",
    )(inputs)
    return found[0], found[1]


def _search_kernel(inputs: _SearchInputs, bound_ref: Any, sums_ref: Any, *, by_mass: bool) -> None:
    """One block: decides the digit before, then sums for this digit over its part of a row."""
    num_values, num_blocks = inputs.z.shape[1], inputs.sums.shape[1]
    row, block = pl.program_id(0), pl.program_id(1)
    digit, entry = inputs.digit[0], jnp.arange(_NUM_SUMS)  # entry i is for trial i + 1, the last one for all values

    part = jnp.arange(pl.next_power_of_2(num_blocks))[:, None]
    before = plgpu.load(inputs.sums.at[row, part, entry[None, :]], mask=part < num_blocks, other=0.0)
    total = jnp.sum(before, axis=0)  # [S]
    goal = inputs.target[row]
    if by_mass:
        goal *= jnp.sum(jnp.where(entry == _NUM_SUMS - 1, total, 0.0))
    # Of the first digit's trials only seven fit into 31 bits.
    is_small, is_all = entry < _NUM_SUMS // 2 - 1, entry == _NUM_SUMS - 1
    is_trial = is_small | ((digit != 1) & ~is_all)
    decided = jnp.sum((is_trial & (total < goal)).astype(jnp.int32))
    shift = _DIGIT_BITS * (_NUM_DIGITS - 1 - digit)
    bound = inputs.bound[row] + jnp.where(digit > 0, decided << jnp.minimum(shift + _DIGIT_BITS, 28), 0)
    plgpu.store(bound_ref.at[row + entry], jnp.full(_NUM_SUMS, bound), mask=(entry == 0) & (block == 0))

    trial = bound + ((entry + 1) << jnp.maximum(shift, 0))
    every_depth = is_all | ((digit == 0) & ~is_small)
    trial = jnp.where(every_depth, jnp.iinfo(jnp.int32).max, trial)[:, None]
    floor = inputs.floor[row]

    def add_tile(tile: Array, sums: Array) -> Array:
        place = tile * _SEARCH_TILE + jnp.arange(_SEARCH_TILE)
        there = place < num_values
        z = plgpu.load(inputs.z.at[row, place], mask=there, other=-jnp.inf)
        depth = lax.bitcast_convert_type(jnp.abs(z), jnp.int32)
        weight = jnp.where(there & (z >= floor), jnp.exp(z) if by_mass else 1.0, 0.0)
        return sums + jnp.where(depth[None, :] < trial, weight[None, :], 0.0)

    num_tiles = pl.cdiv(num_values, _SEARCH_TILE)
    tiles_each = pl.cdiv(num_tiles, num_blocks)
    end = jnp.where(digit < _NUM_DIGITS, jnp.minimum((block + 1) * tiles_each, num_tiles), 0)
    zeros = jnp.zeros((_NUM_SUMS, _SEARCH_TILE), jnp.float32)
    sums = jnp.sum(lax.fori_loop(block * tiles_each, end, add_tile, zeros), axis=1)
    plgpu.store(sums_ref.at[row, block, entry], sums)
