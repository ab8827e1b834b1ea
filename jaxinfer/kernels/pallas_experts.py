"""The experts of a mixture for GPUs, as three Pallas kernels: tokens are grouped by expert and multiplied in blocks.

Owns: the kernels, and how the work of the experts is cut into thread blocks.
Does not know: the router, shards of experts; layers/moe.py has the plain oracle.

A pair is a token and one of its chosen experts. The first kernel lists the pairs expert by expert, each expert's list
padded to whole blocks. The other two take one block of pairs each: all of its pairs multiply the same expert's weights,
so that weights are read once for a block, and those of experts that nobody chose are not read at all.
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
from jaxtyping import Array, Float, Int, Num

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
"""Pairs of a block. Triton multiplies matrices of at least 16 rows. If experts have few pairs each, small blocks leave
less padding."""
_OUT_TILE, _IN_TILE = 64, 64
"""Output features of a thread block, and the input features that it reads at a time; half as many in 32 bits."""
_GROUP_TILE = 1024
"""Pairs that the grouping kernel looks at at a time."""
_GROUP_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)
_PRODUCT_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)
MAX_TOKENS = 2048
"""Tokens that are computed together, so that memory for the experts' outputs is bounded; more are computed in turns."""


class _Groups(NamedTuple):
    """Pairs grouped by expert.

    Args:
        pairs: int32[B, M], token * K + choice of each pair in each block; T * K stands for no pair.
        experts: int32[B], the expert of each block; E for blocks that are not used, whose pairs mean nothing.
    """

    pairs: Any
    experts: Any


class ExpertScales(NamedTuple):
    """What the rows of int8 weights of experts are multiplied by.

    Args:
      gate_up: float32[E, G].
      down: float32[E, D].
    """

    gate_up: Float[Array, "E G"]
    down: Float[Array, "E D"]


class _Operands(NamedTuple):
    """The operands of a product: arrays where it is called, references inside it.

    Args:
        x: float[J, I], the rows to multiply; a pair's row is found by the kernel.
        weight: float[E, O, I], or int8.
        scale: float32[E, O], of int8 weights; else None.
        groups: the pairs.
        shares: float32[T * K], the factor of each pair's output; None where there is none.
    """

    x: Any
    weight: Any
    scale: Any
    groups: _Groups
    shares: Any


def expert_groups(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Num[Array, "E G D"],
    down: Num[Array, "E D F"],
    *,
    gate: Callable[[Array], Array],
    scales: ExpertScales | None = None,
) -> Float[Array, "T D"]:
    """Each token's sum over its chosen experts of share * down(gate(x W_gate) * (x W_up)).

    Args:
        x: tokens.
        expert_ids: the K experts of each token, as indices into E; E itself stands for no expert.
        shares: float32, the factor of each of these experts' outputs.
        gate_up: weights of gate and up, G = 2 F.
        down: weights.
        gate: activation of the gate.
        scales: of int8 weights; None for other weights.

    Returns:
        float32[T, D]. Hidden values and the experts' outputs are rounded to x's dtype.

    Source: blocks of one expert's tokens as in MegaBlocks (Gale et al. 2022).
    """
    run = functools.partial(_run, gate=gate)
    return lax.platform_dependent(
        x,
        expert_ids,
        shares,
        gate_up,
        down,
        scales,
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )


# Jitted on its own, so that it is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("gate", "interpret"))
def _run(
    x: Array,
    expert_ids: Array,
    shares: Array,
    gate_up: Array,
    down: Array,
    scales: ExpertScales | None,
    *,
    gate: Callable[[Array], Array],
    interpret: bool,
) -> Array:
    compute = functools.partial(_computed, gate_up=gate_up, down=down, scales=scales, gate=gate, interpret=interpret)
    starts = range(0, x.shape[0], MAX_TOKENS)
    turns = [tuple(y[start : start + MAX_TOKENS] for y in (x, expert_ids, shares)) for start in starts]
    return jnp.concatenate([compute(*turn) for turn in turns])


def _computed(
    x: Array,
    expert_ids: Array,
    shares: Array,
    *,
    gate_up: Array,
    down: Array,
    scales: ExpertScales | None,
    gate: Callable[[Array], Array],
    interpret: bool,
) -> Array:
    num_tokens, num_chosen = expert_ids.shape
    num_experts = gate_up.shape[0]
    groups = _grouped(expert_ids.ravel(), num_experts, interpret=interpret)
    product = functools.partial(_product, num_chosen=num_chosen, interpret=interpret)
    gate_up_scale, down_scale = (None, None) if scales is None else scales
    hidden = product(_Operands(x, gate_up, gate_up_scale, groups, None), gate=gate, num_rows=groups.pairs.size)
    outputs = product(_Operands(hidden, down, down_scale, groups, shares.ravel()), gate=None, num_rows=expert_ids.size)
    # Where a pair has no expert, its row has never been written.
    chosen = (expert_ids < num_experts)[:, :, None]
    outputs = outputs.reshape(num_tokens, num_chosen, -1).astype(jnp.float32)
    return jnp.sum(jnp.where(chosen, outputs, 0.0), axis=1)


def _grouped(expert_ids: Int[Array, " J"], num_experts: int, *, interpret: bool) -> _Groups:
    """Groups pairs by expert in their order, so that sums do not depend on which thread block is first."""
    num_pairs = expert_ids.shape[0]
    block = min(max(pl.next_power_of_2(num_pairs // num_experts), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    # Every expert's last block may be partly empty, and no block is without a pair.
    num_blocks = min(num_pairs // block + num_experts, num_pairs)
    counts = jnp.sum(expert_ids == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
    pairs, experts = pl.pallas_call(
        _group_kernel,
        grid=(num_experts + 1,),
        out_shape=[
            jax.ShapeDtypeStruct((num_blocks, block), jnp.int32),
            jax.ShapeDtypeStruct((num_blocks,), jnp.int32),
        ],
        compiler_params=_GROUP_PARAMS,
        interpret=interpret,
        name="group_by_expert",
    )(expert_ids, counts)
    return _Groups(pairs, experts)


def _group_kernel(expert_ids: Any, counts: Any, pairs_ref: Any, experts_ref: Any) -> None:
    """One block: the list of one expert; that of expert E marks the blocks that are not used."""
    num_pairs, num_experts = expert_ids.shape[0], counts.shape[0]
    num_blocks, size = pairs_ref.shape
    own = pl.program_id(0)
    expert = jnp.arange(pl.next_power_of_2(num_experts))
    count = plgpu.load(counts.at[expert], mask=expert < num_experts, other=0)
    blocks = lax.div(count + size - 1, size)
    first = jnp.sum(jnp.where(expert < own, blocks, 0))
    own_count = jnp.sum(jnp.where(expert == own, count, 0))
    end = jnp.where(own < num_experts, first + lax.div(own_count + size - 1, size), num_blocks)

    def mark(tile: Array, _: None) -> None:
        block = first + tile * _GROUP_TILE + jnp.arange(_GROUP_TILE)
        plgpu.store(experts_ref.at[block], jnp.full(_GROUP_TILE, own), mask=block < end)

    lax.fori_loop(0, pl.cdiv(end - first, _GROUP_TILE), mark, None)

    def store(place: Array, pair: Array, mask: Array) -> None:
        """Stores pairs at places of the list, which starts with the expert's first block."""
        # The interpreter stores the old value where the mask is off, so those places are moved out of the way.
        place = jnp.where(mask, place, num_blocks * size)
        plgpu.store(pairs_ref.at[first + lax.div(place, size), lax.rem(place, size)], pair, mask=mask)

    padding = own_count + jnp.arange(size)
    store(padding, jnp.full(size, num_pairs), (padding < (end - first) * size) & (own < num_experts))

    def list_tile(tile: Array, num_listed: Array) -> Array:
        pair = tile * _GROUP_TILE + jnp.arange(_GROUP_TILE)
        chosen = plgpu.load(expert_ids.at[pair], mask=pair < num_pairs, other=num_experts)
        is_own = ((chosen == own) & (own < num_experts)).astype(jnp.int32)
        store(num_listed + jnp.cumsum(is_own) - 1, pair, is_own == 1)
        return num_listed + jnp.sum(is_own)

    lax.fori_loop(0, pl.cdiv(num_pairs, _GROUP_TILE), list_tile, 0)


def _product(
    operands: _Operands, *, num_chosen: int, gate: Callable[[Array], Array] | None, num_rows: int, interpret: bool
) -> Array:
    """Multiplies pairs by their experts' weights.

    With a gate, a pair's input is its token's row and its output is stored at the pair's place in the list. Without,
    its input is at that place, and its output is stored at the number of the pair.
    """
    num_out = operands.weight.shape[1] // (1 if gate is None else 2)
    return pl.pallas_call(
        functools.partial(_product_kernel, num_chosen=num_chosen, gate=gate),
        grid=(operands.groups.pairs.shape[0], pl.cdiv(num_out, _OUT_TILE)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), operands.x.dtype),
        compiler_params=_PRODUCT_PARAMS,
        interpret=interpret,
        name="expert_product",
    )(operands)


def _product_kernel(
    operands: _Operands, out_ref: Any, *, num_chosen: int, gate: Callable[[Array], Array] | None
) -> None:
    """One block: a block of pairs and the next _OUT_TILE output features."""
    num_experts, _, num_in = operands.weight.shape
    size, num_out = operands.groups.pairs.shape[1], out_ref.shape[1]
    num_pairs = out_ref.shape[0] if gate is None else operands.x.shape[0] * num_chosen
    block, out_tile = pl.program_id(0), pl.program_id(1)
    expert = operands.groups.experts[block]
    in_tile = _IN_TILE * 2 // operands.x.dtype.itemsize

    @pl.when(expert < num_experts)
    def _multiply() -> None:
        member = jnp.arange(size)
        pair = plgpu.load(operands.groups.pairs.at[block, member])
        exists, place = pair < num_pairs, block * size + member
        source, target = (lax.div(pair, num_chosen), place) if gate is not None else (place, pair)
        feature = out_tile * _OUT_TILE + jnp.arange(_OUT_TILE)
        starts = (0,) if gate is None else (0, num_out)

        def add_inputs(step: Array, sums: list[Array]) -> list[Array]:
            column = (step * in_tile + jnp.arange(in_tile))[None, :]
            inside = column < num_in
            x = plgpu.load(operands.x.at[source[:, None], column], mask=exists[:, None] & inside, other=0.0)
            mask, added = (feature < num_out)[:, None] & inside, []
            for start, total in zip(starts, sums, strict=True):
                where = (expert, start + feature[:, None], column)
                weight = plgpu.load(operands.weight.at[where], mask=mask, other=0.0)
                added.append(total + _dot(x, weight.astype(x.dtype)))
            return added

        zeros = [jnp.zeros((size, _OUT_TILE), jnp.float32)] * len(starts)
        sums = lax.fori_loop(0, pl.cdiv(num_in, in_tile), add_inputs, zeros)
        if operands.scale is not None:
            sums = [
                total
                * plgpu.load(operands.scale.at[expert, start + feature], mask=feature < num_out, other=0.0)[None, :]
                for start, total in zip(starts, sums, strict=True)
            ]
        if gate is not None:
            rounded = [total.astype(out_ref.dtype).astype(jnp.float32) for total in sums]
            out = gate(rounded[0]) * rounded[1]
        else:
            out = sums[0] * plgpu.load(operands.shares.at[pair], mask=exists, other=0.0)[:, None]
        mask = exists[:, None] & (feature < num_out)[None, :]
        plgpu.store(out_ref.at[target[:, None], feature[None, :]], out.astype(out_ref.dtype), mask=mask)


def _dot(x: Float[Array, "M I"], weight: Float[Array, "O I"]) -> Float[Array, "M O"]:
    """x @ weight.T, accumulated in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
