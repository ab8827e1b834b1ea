"""The two norms: RMSNorm and LayerNorm.

Owns: the arithmetic of the norms, with statistics in float32.
Does not know: where in a layer a norm is used.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxinfer.communication.collectives import sum_over_tensor
from jaxinfer.communication.sharding import COLUMN_PARALLEL, PER_STAGE, REPLICATED
from jaxinfer.kernels.pallas_gemv import RowNorm
from jaxinfer.layers.linear import FusedPart


class RMSNorm(nnx.Module):
    """x / rms(x) * (weight + offset), statistics in float32.

    Args:
      size: features, D.
      eps: added to the mean square.
      num_stages: pipeline stages when the norm belongs to a layer; None when every device holds the one norm.
      dtype: of the weight.
      offset: added to the weight; Gemma stores weights around 0 and adds 1.
      sharded: None if every shard has all features, which is the common case. Else the rows of the column-parallel
        product whose output is normalised, which is split over the "tensor" axis; the squares are then summed over the
        shards. Every kv head has equally many copies, so counting them all leaves the mean unchanged.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; rounding order as in the models' own code:
    without an offset, the cast back to x's dtype comes before the weight (Llama); with one, after it (Gemma).
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        num_stages: int | None,
        dtype: jnp.dtype,
        offset: float = 0.0,
        sharded: FusedPart | None = None,
    ):
        self.size = size
        self.eps = eps
        self.offset = offset
        self.per_stage = num_stages is not None
        shape = (size,) if num_stages is None else (num_stages, size)
        self.sharded = sharded is not None
        if sharded is not None:
            self.weight = nnx.Param(jnp.zeros(shape, dtype), spec=COLUMN_PARALLEL, parts=(sharded,))
        else:
            self.weight = nnx.Param(jnp.zeros(shape, dtype), spec=PER_STAGE if self.per_stage else REPLICATED)

    @property
    def row_norm(self) -> RowNorm | None:
        """Weight, eps and offset for a kernel that norms a row itself; None where features are split over shards."""
        return None if self.sharded else RowNorm(self._weight, self.eps, self.offset)

    @property
    def _weight(self) -> Float[Array, " D"]:
        return self.weight[0] if self.per_stage else self.weight[...]

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; keeps x's dtype."""
        wide = x.astype(jnp.float32)
        squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
        squares = sum_over_tensor(squares) if self.sharded else squares
        wide = wide * lax.rsqrt(squares / self.size + self.eps)
        if self.offset:
            return (wide * (self._weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return self._weight * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * weight + bias, statistics in float32.

    Args:
      size: features, D.
      eps: added to the variance.
      num_stages: pipeline stages when the norm belongs to a layer; None when every device holds the one norm.
      dtype: of weight and bias.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization".
    """

    def __init__(self, size: int, *, eps: float, num_stages: int | None, dtype: jnp.dtype):
        self.eps = eps
        self.per_stage = num_stages is not None
        shape = (size,) if num_stages is None else (num_stages, size)
        spec = PER_STAGE if self.per_stage else REPLICATED
        self.weight = nnx.Param(jnp.zeros(shape, dtype), spec=spec)
        self.bias = nnx.Param(jnp.zeros(shape, dtype), spec=spec)

    @property
    def row_norm(self) -> None:
        """None, since no kernel computes a LayerNorm."""
        return None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; keeps x's dtype."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        index = 0 if self.per_stage else ...
        weight, bias = self.weight[index].astype(jnp.float32), self.bias[index].astype(jnp.float32)
        return (wide * weight + bias).astype(x.dtype)
