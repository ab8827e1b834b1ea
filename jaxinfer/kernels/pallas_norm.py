"""The addition to the residual stream and the norm that follows it, as one Pallas kernel.

A block's output may come in parts (the product that made it is split along its inputs, so that a few rows fill the
whole GPU); the kernel adds them up as well. XLA would take a kernel for each of the three steps.

Owns: the kernel. layers/residual.py and layers/norm.py have the same steps one by one, for other backends and as this
kernel's oracle.
Does not know: which block made the parts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxinfer.kernels.pallas_gemv import RowNorm

_FEATURES_PER_WARP = 1024


class _Inputs(NamedTuple):
    """The operands: arrays where the kernel is called, references inside it."""

    x: Any
    parts: Any
    weight: Any


def add_norm(
    x: Float[Array, "T D"], parts: Float[Array, "S T D"], norm: RowNorm
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Adds the sum of the parts to x, and norms the result.

    Args:
        x: the residual stream.
        parts: what is to be added, in x's dtype or float32.
        norm: as RMSNorm applies it to the new stream.

    Returns:
        The new stream and the normed one, in x's dtype. Sums are float32; the new stream is rounded before it is
        normed.
    """
    run = functools.partial(_run, eps=norm.eps, offset=norm.offset)
    return lax.platform_dependent(
        _Inputs(x, parts, norm.weight),
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )


# Jitted on its own, so that it is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def _run(inputs: _Inputs, *, eps: float, offset: float, interpret: bool) -> tuple[Array, Array]:
    num_tokens, num_features = inputs.x.shape
    num_warps = min(max(pl.next_power_of_2(num_features) // _FEATURES_PER_WARP, 1), 16)
    found = pl.pallas_call(
        functools.partial(_kernel, eps=eps, offset=offset),
        grid=(num_tokens,),
        out_shape=[jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(inputs)
    return found[0], found[1]


def _kernel(inputs: _Inputs, sum_ref: Any, normed_ref: Any, *, eps: float, offset: float) -> None:
    """One block: one token."""
    num_parts, _, num_features = inputs.parts.shape
    token, feature = pl.program_id(0), jnp.arange(pl.next_power_of_2(num_features))
    exists = feature < num_features

    def loaded(ref: Any) -> Float[Array, " D"]:
        return plgpu.load(ref, mask=exists, other=0.0).astype(jnp.float32)

    added = sum(loaded(inputs.parts.at[part, token, feature]) for part in range(num_parts))
    total = (loaded(inputs.x.at[token, feature]) + added).astype(sum_ref.dtype)
    plgpu.store(sum_ref.at[token, feature], total, mask=exists)
    wide = total.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.sum(wide * wide) / num_features + eps)
    weight = loaded(inputs.weight.at[feature])
    # Rounded where RMSNorm rounds: after the weight with an offset, before it without.
    if offset:
        normed = normed * (weight + offset)
    else:
        normed = normed.astype(normed_ref.dtype).astype(jnp.float32) * weight
    plgpu.store(normed_ref.at[token, feature], normed.astype(normed_ref.dtype), mask=exists)
