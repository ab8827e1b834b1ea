"""Rotary position embedding and its context extensions.

Owns: the frequencies of each rule and the rotation.
Does not know: which layers rotate, what is cached.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import RopeConfig


def rotary_frequencies(rope: RopeConfig, head_dim: int, *, max_model_len: int) -> tuple[np.ndarray, float]:
    """Angles per position and the factor on cos and sin, for one base and extension rule.

    Args:
      rope: the rule and its numbers.
      head_dim: H, even.
      max_model_len: tokens the engine will serve; only "dynamic" depends on it.

    Returns:
      float32[H / 2] radians per position, and the attention factor (1 except for yarn).

    Source: Su et al. 2021 (RoFormer); Peng et al. 2023 (YaRN); Llama 3.1's band rule; all as in Hugging Face
    transformers' modeling_rope_utils, against whose results they are tested. Deviation: transformers recomputes the
    dynamic base as a text grows, so that a key's rotation depends on when it was computed; here the base is the one
    that transformers uses for a text of max_model_len tokens, whatever the schedule.
    """
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


def rotary_tables(
    positions: Int[Array, " T"], frequencies: np.ndarray, attention_factor: float
) -> tuple[Float[Array, "T J"], Float[Array, "T J"]]:
    """cos and sin of every token's angles, float32[T, H / 2], times the attention factor."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(x: Float[Array, "T N H"], tables: tuple[Float[Array, "T J"], Float[Array, "T J"]]) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + H / 2) of every head; keeps x's dtype."""
    cos, sin = (table.astype(x.dtype)[:, None, :] for table in tables)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
