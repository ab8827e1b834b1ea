"""The noise of sampling: a counter-based generator of random bits, and Gumbel noise made of them.

Owns: which bits belong to a seed, a position and a token id.
Does not know: logits, filters, devices.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def random_bits(
    seed: UInt32[Array, "R 2"], position: Int[Array, " R"], token_id: Int[Array, "*R J"]
) -> UInt32[Array, "R J"]:
    """32 random bits that depend on seed, position and token id only, not on batch, slice or mesh.

    Source: Threefry-2x32 with 20 rounds, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the seed
    is the key, (position, token id) the counter, the first output word the result.
    """
    key0, key1 = seed[:, 0, None], seed[:, 1, None]
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0 = position.astype(jnp.uint32)[:, None] + keys[0]
    x1 = token_id.astype(jnp.uint32) + keys[1]
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    for group in range(5):
        for rotation in rotations[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0


def gumbel_noise(
    seed: UInt32[Array, "R 2"], position: Int[Array, " R"], token_id: Int[Array, "*R J"]
) -> Float[Array, "R J"]:
    """Standard Gumbel noise that depends on seed, position and token id only.

    With v uniform in (0, 1), -log(-log1p(-v)) is largest for small v. There floats are finest, so the noise is precise
    where it decides which token wins.
    """
    v = (random_bits(seed, position, token_id).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    v = jnp.minimum(v, jnp.float32(1 - 2.0**-24))  # the largest bits round to 1, which would give -inf
    return -jnp.log(-jnp.log1p(-v))
