"""Rotary position embedding and its context extensions.

Owns: the frequencies of each extension rule and the rotation itself.
Does not know: which layers rotate, nor what is cached.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config.model_config import RopeConfig

RotaryTables = tuple[Float[Array, "T J"], Float[Array, "T J"]]
"""The cosines and the sines of every token's angles, each [T, J] for J rotated pairs."""


def rotary_frequencies(rope: RopeConfig, head_dim: int, *, max_model_len: int) -> tuple[np.ndarray, float]:
    """The rotary frequencies of one base and extension rule, and the factor by which it multiplies cos and sin.

    Args:
      rope: the rule and its numbers.
      head_dim: H, even.
      max_model_len: tokens of the longest text that the engine will serve; only "dynamic" and "longrope" depend on it.

    Returns:
      float32[J], radians per position for each of the J rotated pairs, and the attention factor (1 except for yarn and
      longrope).

    Source: Su et al. 2021 (RoFormer); Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE); Llama 3.1's band rule; all
    as in Hugging Face transformers' modeling_rope_utils, against whose results they are tested. Deviation: in
    transformers the "dynamic" base changes as a text grows, and "longrope" goes over from its short factors to its long
    ones, so that the rotation of a key depends on when it was computed. Here both are fixed to what transformers uses
    for a text of max_model_len tokens. (To serve short texts with the short factors, lower max_model_len.)
    """
    head_dim = rope.rotated_dims(head_dim)
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.theta**-exponents
    if rope.kind == "linear":
        return _float32(frequencies / rope.factor), 1.0
    if rope.kind == "dynamic":
        return _float32(_dynamic_base(rope, head_dim, max_model_len) ** -exponents), 1.0
    if rope.kind == "llama3":
        return _float32(_llama3(rope, frequencies)), 1.0
    if rope.kind == "yarn":
        return _float32(_yarn(rope, frequencies, head_dim)), _yarn_attention_factor(rope)
    if rope.kind == "longrope":
        is_long = max_model_len > rope.original_max_len
        factors = np.asarray(rope.long_factors if is_long else rope.short_factors)
        return _float32(frequencies / factors), _longrope_attention_factor(rope)
    return _float32(frequencies), 1.0


def _float32(frequencies: np.ndarray) -> np.ndarray:
    return frequencies.astype(np.float32)


def _dynamic_base(rope: RopeConfig, head_dim: int, max_model_len: int) -> float:
    length = max(max_model_len, rope.original_max_len)
    stretch = rope.factor * length / rope.original_max_len - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    rotations = rope.original_max_len * frequencies / (2 * math.pi)
    keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolate = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return interpolate * frequencies / rope.factor + (1 - interpolate) * frequencies


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_len)) if rope.factor > 1 else 1.0


def rotary_tables(positions: Int[Array, " T"], frequencies: np.ndarray, attention_factor: float) -> RotaryTables:
    """The cosines and sines of every token's angles, times the attention factor, each float32[T, J]."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(x: Float[Array, "T N H"], tables: RotaryTables) -> Float[Array, "T N H"]:
    """Rotates every head's pairs of dimensions (i, i + J), i < J, and leaves those from 2 J on; keeps x's dtype."""
    cos, sin = (table.astype(x.dtype)[:, None, :] for table in tables)
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
