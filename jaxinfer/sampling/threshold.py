"""The search for a filter's threshold: the largest value for which the values that reach it weigh enough.

Owns: the search in plain JAX, and the choice between it and the GPU's kernel.
Does not know: which filters there are.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxinfer.communication.collectives import sum_over_vocabulary
from jaxinfer.kernels import pallas_sampling

_BITS_OF_INFINITY = 0x7F800000


@partial(jax.jit, static_argnames=("by_mass", "backend"))  # traced once, though a program may search several times
def largest_threshold(
    z: Float[Array, "R V"], *, floor: Float[Array, " R"], target: Float[Array, " R"], by_mass: bool, backend: str
) -> Float[Array, " R"]:
    """The largest t <= 0 for which the values z >= t, over all slices, weigh enough; -inf if none does.

    z is at most 0, so the bits of -z, read as an integer, order the values from the best down.

    Args:
      z: float32[R, V / devices], this device's slice.
      floor: float32[R]; values below it weigh nothing.
      target: float32[R].
      by_mass: if True, each value weighs exp(z) and the target is a share of the weight of all; else each value weighs
        1 and the target is a number of values.
      backend: name of the kernel backend; "pallas" decides several bits in one kernel, the others one bit at a time.
    """
    if backend == "pallas":
        return pallas_sampling.largest_threshold(
            z, floor=floor, target=target, by_mass=by_mass, over_shards=sum_over_vocabulary
        )
    weights = jnp.where(z >= floor[:, None], jnp.exp(z) if by_mass else 1.0, 0.0)
    if by_mass:
        target = target * sum_over_vocabulary(jnp.sum(weights, axis=-1))
    depth = smallest_bound(lax.bitcast_convert_type(jnp.abs(z), jnp.uint32), weights, target)
    return -lax.bitcast_convert_type(jnp.minimum(depth, jnp.uint32(_BITS_OF_INFINITY)), jnp.float32)


def smallest_bound(
    keys: UInt32[Array, "R V"], weights: Float[Array, "R V"], target: Float[Array, " R"]
) -> UInt32[Array, " R"]:
    """The smallest b for which the weights of {keys <= b}, summed over all slices, reach target.

    The search decides one bit at a time, in a loop: on CPUs every comparison costs time, and unrolled rounds would have
    to be compiled.
    """

    def fix_bit(i: Array, bound: Array) -> Array:
        bit = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        below = jnp.where(keys < (bound | bit)[:, None], weights, 0.0)
        return jnp.where(sum_over_vocabulary(jnp.sum(below, axis=-1)) < target, bound | bit, bound)

    return lax.fori_loop(0, 32, fix_bit, jnp.zeros(keys.shape[0], jnp.uint32))
