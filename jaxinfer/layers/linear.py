"""Column- and row-parallel linear layers, Megatron's pair: a block of both needs one psum, at its end.

Owns: the weights' order of axes, how one product is computed, and what is computed together with it: the norm of
its input, the gate on its output, the addition to the residual stream.
Does not know: attention, nor how tokens are batched.

Weights keep the checkpoint's order [out, in], which GPU kernels and int8 products read. On CPUs, float weights are kept
as [in, out]: XLA's products of 2 to 32 rows take 15 to 37 % less time so, as it packs weights of [out, in] anew in
every product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Required, TypedDict

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

from jaxinfer.communication.collectives import num_shards, sum_over_tensor
from jaxinfer.communication.sharding import COLUMN_PARALLEL, PER_STAGE, ROW_PARALLEL
from jaxinfer.kernels.pallas_gemm import few_rows_linear
from jaxinfer.kernels.pallas_gemv import one_row_linear
from jaxinfer.layers.residual import Norm, PendingSum, Stream, added
from jaxinfer.layers.weight import int8_product, weight_params

MANY_ROWS = 64
"""From so many rows on, a GPU's products are left to cuBLAS (wrappers/xla_options.py)."""


def project(
    x: Float[Array, "T I"],
    weight: Num[Array, "..."],
    scale: Float[Array, " O"] | None = None,
    *,
    inputs_first: bool = False,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "T O"]:
    """x @ weight.T, or x @ weight with inputs_first; float32 inputs are multiplied in full float32 on every platform.

    Args:
      x: float[T, I].
      weight: float[O, I] or, with inputs_first, float[I, O], of x's dtype; or int8[O, I].
      scale: float32[O], by which rows of int8 weights are multiplied; None for other weights.
      out_dtype: dtype of the result, in which products are summed; None for x's dtype.
    """
    if scale is not None:
        return int8_product(x, weight, scale).astype(out_dtype or x.dtype)
    # HIGHEST keeps a GPU from rounding float32 to TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=out_dtype)
    plain = functools.partial(einsum, "ti,io->to" if inputs_first else "ti,oi->to")
    if x.shape[0] == 1 and weight.shape[0] % 2 == 0:
        in_halves = functools.partial(_two_halves, einsum)
        if inputs_first:
            in_halves = functools.partial(_sum_of_two_halves, einsum, out_dtype=out_dtype or x.dtype)
        return lax.platform_dependent(x, weight, cpu=in_halves, default=plain)
    return plain(x, weight)


def _two_halves(
    einsum: Callable[..., Array], x: Float[Array, "1 I"], weight: Float[Array, "O I"]
) -> Float[Array, "1 O"]:
    """The product as a batch of two: for one row, XLA's CPU backend is 6 % faster so.

    A step took 23.1 instead of 24.7 ms on two cores. Without the batch axis in x as well, it would transpose the
    weights.
    """
    halves = weight.reshape(2, weight.shape[0] // 2, weight.shape[1])
    both = jnp.broadcast_to(x, (2, *x.shape))
    return einsum("bti,boi->tbo", both, halves).reshape(x.shape[0], -1)


def _sum_of_two_halves(
    einsum: Callable[..., Array], x: Float[Array, "1 I"], weight: Float[Array, "I O"], *, out_dtype: jnp.dtype
) -> Float[Array, "1 O"]:
    """The same for weights with their inputs first: half of the inputs in each, a fifth faster than in one piece."""
    halves = weight.reshape(2, weight.shape[0] // 2, weight.shape[1])
    parts = einsum("bti,bio->bto", x.reshape(2, 1, -1), halves, preferred_element_type=jnp.float32)
    return parts.sum(axis=0).astype(out_dtype)


def gated(x: Float[Array, "*T G"], gate: Callable[[Array], Array]) -> Float[Array, "*T F"]:
    """Splits the last axis into two halves and returns gate(first half) * second half."""
    first, second = jnp.split(x, 2, axis=-1)
    return gate(first) * second


@dataclass(frozen=True, slots=True)
class FusedPart:
    """What one checkpoint tensor contributes to a parameter, into which others may be fused.

    The rows (output features) of the parameter are split over the shards.

    Args:
      stored: rows of the checkpoint tensor.
      copies: how often the parameter repeats each group of `unit` rows, the copies next to each other. 2 kv heads on 4
        shards take 2 copies: heads 0, 0, 1, 1, one for each shard.
      unit: rows of a group, such as the dimensions of a kv head.
    """

    stored: int
    copies: int = 1
    unit: int = 1

    @property
    def size(self) -> int:
        """Rows of the parameter, summed over all shards."""
        return self.stored * self.copies


class LinearOptions(TypedDict, total=False):
    """Keywords of both linear layers, for blocks that pass them on.

    Args:
      num_stages: pipeline stages, the leading axis of the parameters.
      dtype: of the parameters.
      backend: name of the kernel backend.
      bias: whether the layer has a bias.
      quantization: of the matrix; "int8" or None.
      inputs_first: whether the matrix is kept as [in, out].
    """

    num_stages: Required[int]
    dtype: Required[jnp.dtype]
    backend: Required[str]
    bias: bool
    quantization: str | None
    inputs_first: bool


class ColumnParallelLinear(nnx.Module):
    """y = norm(x) W^T + b with the output features split over the "tensor" axis; no communication.

    Args:
      in_size: input features.
      parts: output features of each matrix that is fused into this one. Of every matrix, shard t holds the t-th slice.
      num_stages: pipeline stages, the leading axis of the parameters.
      bias: whether the layer has a bias.
      dtype: of the parameters.
      quantization, inputs_first: as LinearOptions'.
      backend: name of the kernel backend; with "pallas", product and gate of a few rows are one kernel, for a single
        row with the norm.
    """

    def __init__(
        self,
        in_size: int,
        parts: tuple[FusedPart, ...],
        *,
        num_stages: int,
        dtype: jnp.dtype,
        bias: bool = False,
        quantization: str | None = None,
        inputs_first: bool = False,
        backend: str = "xla",
    ):
        out_size = sum(part.size for part in parts)
        metadata = {"spec": COLUMN_PARALLEL, "parts": parts}
        shape = (num_stages, out_size, in_size)
        self.inputs_first = inputs_first
        self.weight, self.weight_scale = weight_params(
            shape, dtype, quantization=quantization, inputs_first=inputs_first, **metadata
        )
        self.bias = nnx.Param(jnp.zeros(shape[:2], dtype), **metadata) if bias else None
        self.backend = backend

    def __call__(
        self, x: Float[Array, "T I"], *, norm: Norm | None = None, gate: Callable[[Array], Array] | None = None
    ) -> Float[Array, "T O"]:
        """Maps the full [T, in] to this shard's [T, out / tp].

        Args:
          x: input, equal on all shards.
          norm: applied to x first; None for none.
          gate: activation that turns the output into gate(first half) * second half, [T, out / tp / 2]; None for none.
        """
        bias = None if self.bias is None else self.bias[0]
        scale = None if self.weight_scale is None else self.weight_scale[0]
        row_norm = None if norm is None else norm.row_norm
        if norm is not None and row_norm is None:
            x = norm(x)
        if self.backend == "pallas" and x.shape[0] == 1:
            return one_row_linear(x, self.weight[0], scale, norm=row_norm, bias=bias, gate=gate)
        x = x if norm is None or row_norm is None else norm(x)
        if self.backend == "pallas" and x.shape[0] < MANY_ROWS:
            return few_rows_linear(x, self.weight[0], scale, bias=bias, gate=gate)
        y = project(x, self.weight[0], scale, inputs_first=self.inputs_first)
        y = y if bias is None else y + bias
        return y if gate is None else gated(y, gate)


class RowParallelLinear(nnx.Module):
    """y = residual + norm(x W^T + b) with the input features split over the "tensor" axis; one psum, then the bias.

    Args:
      in_size, out_size: features, summed over all shards.
      num_stages: pipeline stages, the leading axis of the parameters.
      bias: whether the layer has a bias.
      dtype: of the parameters.
      quantization, inputs_first: as LinearOptions'.
      backend: name of the kernel backend. With "pallas", a single row is computed in one kernel, which also adds bias
        and residual where neither a psum nor a norm comes in between; a few rows have a kernel too, and their addition
        to the residual waits for the norm of the next block.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        num_stages: int,
        dtype: jnp.dtype,
        bias: bool = False,
        quantization: str | None = None,
        inputs_first: bool = False,
        backend: str = "xla",
    ):
        self.inputs_first = inputs_first
        self.weight, self.weight_scale = weight_params(
            (num_stages, out_size, in_size),
            dtype,
            spec=ROW_PARALLEL,
            quantization=quantization,
            inputs_first=inputs_first,
        )
        self.bias = nnx.Param(jnp.zeros((num_stages, out_size), dtype), spec=PER_STAGE) if bias else None
        self.backend = backend

    def __call__(
        self,
        x: Float[Array, "T I"],
        *,
        residual: Float[Array, "T O"] | None = None,
        norm: Norm | None = None,
        tap: Callable[[Array], Array] | None = None,
    ) -> Stream:
        """Maps this shard's [T, in / tp] to the full [T, out], equal on all shards.

        Args:
          x: this shard's features.
          residual: added at the end; None for nothing.
          norm: applied to the product before the residual is added; None for none.
          tap: what happens to the sum over shards, after the norm and before the residual is added; None for nothing.
        """
        bias = None if self.bias is None else self.bias[0]
        scale = None if self.weight_scale is None else self.weight_scale[0]
        # Whether the residual is added right after the product, with nothing in between.
        is_last = num_shards() == 1 and norm is None and tap is None
        if self.backend == "pallas" and x.shape[0] == 1:
            if is_last:
                return one_row_linear(x, self.weight[0], scale, bias=bias, residual=residual)
            y = one_row_linear(x, self.weight[0], scale)
        elif self.backend == "pallas" and is_last and x.shape[0] < MANY_ROWS and bias is None and residual is not None:
            return PendingSum(residual, few_rows_linear(x, self.weight[0], scale))
        elif self.backend == "pallas" and x.shape[0] < MANY_ROWS:
            y = few_rows_linear(x, self.weight[0], scale)
        else:
            y = project(x, self.weight[0], scale, inputs_first=self.inputs_first)
        y = sum_over_tensor(y)
        y = y if bias is None else y + bias
        y = y if norm is None else norm(y)
        y = y if tap is None else tap(y)
        if residual is None:
            return y
        # A product of many rows on one device adds the residual itself (cuBLAS can).
        return residual + y if is_last else added(residual, y, backend=self.backend)
