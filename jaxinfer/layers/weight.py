"""How a matrix of weights is kept: outputs or inputs first, as floats or as int8 with one scale for each output.

Owns: the parameters of a matrix, rounding to int8 and back, and the product with int8 weights.
Does not know: which layer multiplies, how tensors are found in a checkpoint.

An int8 matrix takes a quarter of float32's memory. Only the weights are rounded: activations keep 16 bits in a product
on a CPU, and their own dtype on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Int32

SCALE = "_scale"
"""What the name of an int8 matrix has at its end in the name of its scales: "weight" and "weight_scale"."""
_LARGEST = 127
_DIGIT = 256
"""An activation is _DIGIT * a + b with a and b in int8."""


def weight_params(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    spec: PartitionSpec,
    quantization: str | None,
    inputs_first: bool = False,
    **metadata: Any,
) -> tuple[nnx.Param, nnx.Param | None]:
    """The parameter of a matrix, and the parameter of its scales (None if it is not quantised).

    Args:
      shape: [.., O, I].
      dtype: of the matrix if it is not quantised.
      spec: how the matrix lies on the mesh, for [.., O, I]; its scales lie like its outputs.
      quantization: "int8" or None.
      inputs_first: whether the parameter is [.., I, O]; not for int8.
      metadata: of the matrix, for the loader.
    """
    if inputs_first:
        shape, spec, metadata["inputs_first"] = swapped_axes(shape), _swapped_spec(spec, len(shape)), True
    if quantization is None:
        return nnx.Param(jnp.zeros(shape, dtype), spec=spec, **metadata), None
    values = nnx.Param(jnp.zeros(shape, jnp.int8), spec=spec, float_dtype=dtype, **metadata)
    return values, nnx.Param(jnp.zeros(shape[:-1], jnp.float32), spec=_of_rows(spec, len(shape)), is_scale=True)


def swapped_axes(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """What stands for the axes of a matrix, with the last two swapped."""
    *others, outputs, inputs = shape
    return (*others, inputs, outputs)


def swapped_sharding(sharding: NamedSharding, num_axes: int) -> NamedSharding:
    """How a matrix lies on the mesh when its last two axes are swapped."""
    return NamedSharding(sharding.mesh, _swapped_spec(sharding.spec, num_axes))


def _swapped_spec(spec: PartitionSpec, num_axes: int) -> PartitionSpec:
    return PartitionSpec(*swapped_axes((*spec, *[None] * (num_axes - len(spec)))))


def quantize(weight: Float[Array, "*N O I"]) -> tuple[Int8[Array, "*N O I"], Float[Array, "*N O"]]:
    """Rounds every row to integers in -127 .. 127 times a scale of its own, in float32.

    The largest number of a row becomes 127 or -127; a row of zeros has the scale 0.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-1) / _LARGEST
    steps = weight / jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


@functools.cache
def quantizer(sharding: NamedSharding, num_axes: int) -> Callable[[Array], tuple[Array, Array]]:
    """A compiled `quantize` for matrices that lie on a mesh; a row's scale is the same on all devices that share it.

    Args:
      sharding: of the matrix, float and int8; its scales lie like its rows.
      num_axes: of the matrix.
    """
    scale_sharding = NamedSharding(sharding.mesh, _of_rows(sharding.spec, num_axes))
    return jax.jit(quantize, out_shardings=(sharding, scale_sharding))


def _of_rows(spec: PartitionSpec, num_axes: int) -> PartitionSpec:
    return PartitionSpec(*spec[: num_axes - 1])


def dequantize(values: Int8[Array, "*N O I"], scale: Float[Array, "*N O"], dtype: jnp.dtype) -> Float[Array, "*N O I"]:
    """The matrix that int8 values with these scales stand for."""
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


def int8_product(x: Float[Array, "T I"], values: Int8[Array, "O I"], scale: Float[Array, " O"]) -> Float[Array, "T O"]:
    """x @ dequantize(values, scale).T in float32, without a float copy of the matrix on a CPU.

    Args:
      x: float[T, I].
      values: int8[O, I], of at most 2^17 inputs.
      scale: float32[O].
    """
    return lax.platform_dependent(x, values, scale, cpu=_by_digits, default=_converted)


def _converted(x: Array, values: Array, scale: Array) -> Array:
    """Multiplies in x's dtype, summing in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    sums = jnp.einsum("ti,oi->to", x, values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return sums * scale


def _by_digits(x: Array, values: Array, scale: Array) -> Array:
    """Multiplies integers, whose sums are exact, so that a row's result is the same among any others.

    For a product of int8 with floats, XLA's CPU backend makes a float copy of the matrix and takes 8 times as long as
    with a float matrix. From two rows on, it is fast at int8 with int8. So every activation is rounded to 16 bits and
    taken apart into two int8 digits, which are two rows of the product.
    """
    num_rows = x.shape[0]
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    steps = x * jnp.where(largest == 0, 0, _LARGEST * _DIGIT / largest)
    digits = _digits(jnp.round(steps).astype(jnp.int32)).reshape(2 * num_rows, -1)
    sums = lax.dot_general(digits, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    high, low = sums.astype(jnp.float32).reshape(2, num_rows, -1)
    return (high * _DIGIT + low) * (largest / (_LARGEST * _DIGIT)) * scale


def _digits(numbers: Int32[Array, "T I"]) -> Int8[Array, "2 T I"]:
    """The digits a and b of numbers _DIGIT * a + b with -128 <= b < 128, for numbers in -32512 .. 32512."""
    half, shift = (jnp.array(pair, jnp.int32)[:, None, None] for pair in ((_DIGIT // 2, 0), (8, 0)))
    return ((numbers + half) >> shift).astype(jnp.int8)  # the conversion of b drops what belongs to a
