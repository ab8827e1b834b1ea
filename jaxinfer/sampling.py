"""The jitted sampler: a threshold and a Gumbel argmax over a vocabulary that is sharded over the mesh.

Owns: the noise, the filters, the three samplers (greedy, candidates, full) and log-probabilities. Nothing here sorts
the vocabulary and no row of logits leaves its shard.
Does not know: requests, slots, models. All functions run inside a shard_map over ("pipe", "tensor").

Every filter lowers the allowed set to {z >= threshold}, z = (logits - max) / temperature: top-k (ties kept), then top-p
on the softmax over what top-k left (the crossing token and its ties stay), then min-p. The token is the argmax over the
allowed set of z + Gumbel noise, the lowest id on ties; temperatures below MIN_TEMPERATURE are greedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxinfer.communication.collectives import (
    gather_candidates,
    max_over_vocabulary,
    min_over_vocabulary,
    sum_over_vocabulary,
    vocabulary_shard,
)

MIN_TEMPERATURE = 1e-5
NUM_CANDIDATES = 65
"""Of every slice; the last only bounds what lies outside, so that top_k up to 64 is exact."""
_GROUP = 128
_DIGIT_BITS = 4
_NO_ID = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingNumbers:
    """What each row asks for; filters that are off hold 0, 1, 0.

    Args:
      temperature, top_p, min_p: float32[R].
      top_k: int32[R].
      seed: uint32[R, 2], low word first.
    """

    temperature: Float[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
    top_k: Int[Array, " R"]
    seed: UInt32[Array, "R 2"]

    @classmethod
    def unpack(cls, words: Int[Array, "R F"]) -> SamplingNumbers:
        """From the int32 words of wrappers/step_batch.py's pack_sampling."""
        floats = lax.bitcast_convert_type(words[:, :3], jnp.float32)
        seed = lax.bitcast_convert_type(words[:, 4:6], jnp.uint32)
        return cls(temperature=floats[:, 0], top_p=floats[:, 1], min_p=floats[:, 2], top_k=words[:, 3], seed=seed)


class TokenLogprobArrays(NamedTuple):
    """Raw log-probabilities: of the sampled token with its rank, and the most likely tokens, best first."""

    logprob: Float[Array, " R"]
    rank: Int[Array, " R"]
    top_ids: Int[Array, "R K"]
    top_logprobs: Float[Array, "R K"]


def random_bits(
    seed: UInt32[Array, "R 2"], position: Int[Array, " R"], token_id: Int[Array, "*R J"]
) -> UInt32[Array, "R J"]:
    """32 random bits for every (seed, position, token id), whatever the slice, batch or mesh.

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
    """Standard Gumbel noise for every (seed, position, token id).

    v is uniform in (0, 1) and -log(-log1p(-v)) keeps full precision where it matters: at small v, the winning tail.
    """
    v = (random_bits(seed, position, token_id).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    v = jnp.minimum(v, jnp.float32(1 - 2.0**-24))  # 1 itself, a rounding of the last bits, would give -inf
    return -jnp.log(-jnp.log1p(-v))


def local_token_ids(local_size: int) -> Int[Array, " V"]:
    """Ids of this device's slice of the vocabulary."""
    return vocabulary_shard() * local_size + jnp.arange(local_size, dtype=jnp.int32)


def argmax_over_vocabulary(values: Float[Array, "R J"], token_ids: Int[Array, "*R J"]) -> Int[Array, " R"]:
    """The id of the largest value over all slices, the lowest id on ties."""
    best = max_over_vocabulary(jnp.max(values, axis=-1))
    winners = jnp.where(values == best[:, None], token_ids, _NO_ID)
    return min_over_vocabulary(jnp.min(winners, axis=-1))


def greedy(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    """The most likely token of every row, the lowest id on ties.

    Args:
      logits: float32[R, V / devices], this device's slice.
    """
    return argmax_over_vocabulary(logits, local_token_ids(logits.shape[1]))


def _scaled(logits: Float[Array, "R V"], temperature: Float[Array, " R"]) -> Float[Array, "R V"]:
    """(logits - max) / temperature: at most 0, never overflowing; greedy rows are only shifted."""
    best = max_over_vocabulary(jnp.max(logits, axis=-1))
    divisor = jnp.where(temperature < MIN_TEMPERATURE, 1.0, temperature)
    return (logits - best[:, None]) / divisor[:, None]


def _pick(
    z: Float[Array, "R J"],
    allowed: Bool[Array, "R J"],
    token_ids: Int[Array, "*R J"],
    numbers: SamplingNumbers,
    position: Int[Array, " R"],
) -> Int[Array, " R"]:
    noise = gumbel_noise(numbers.seed, position, token_ids)
    random = (numbers.temperature >= MIN_TEMPERATURE)[:, None]
    return argmax_over_vocabulary(jnp.where(allowed | ~random, z + jnp.where(random, noise, 0.0), -jnp.inf), token_ids)


def _order_keys(x: Float[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(
    keys: UInt32[Array, "R V"], weights: Float[Array, "R V"], target: Float[Array, " R"]
) -> UInt32[Array, " R"]:
    """The largest t for which the weights of {keys >= t} over all slices sum to at least target.

    A radix search from the highest digit down; one psum of [R, 15] a digit.
    """
    threshold = jnp.zeros(keys.shape[0], jnp.uint32)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        trials = [threshold | jnp.uint32(digit << shift) for digit in range(1, 1 << _DIGIT_BITS)]
        sums = [jnp.sum(jnp.where(keys >= trial[:, None], weights, 0.0), axis=-1) for trial in trials]
        reached = sum_over_vocabulary(jnp.stack(sums, axis=-1)) >= target[:, None]
        digit = jnp.sum(reached, axis=-1).astype(jnp.uint32)
        threshold = threshold | (digit << shift)
    return threshold


def sample_full(logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"]) -> Int[Array, " R"]:
    """Samples with any filters over the whole vocabulary.

    Args:
      logits: float32[R, V / devices], this device's slice.
      numbers: what each row asks for.
      position: int32[R], index in its text of the token being sampled.

    Returns:
      int32[R] token ids, equal on all devices.
    """
    z = _scaled(logits, numbers.temperature)

    def filtered(z: Array) -> Array:
        keys = _order_keys(z)
        one = jnp.ones_like(z)
        top_k = _largest_threshold(keys, one, numbers.top_k.astype(jnp.float32))
        top_k = jnp.where(numbers.top_k > 0, top_k, 0)
        mass = jnp.where(keys >= top_k[:, None], jnp.exp(z), 0.0)
        target = numbers.top_p * sum_over_vocabulary(jnp.sum(mass, axis=-1))
        top_p = jnp.where(numbers.top_p < 1, _largest_threshold(keys, mass, target), 0)
        return (keys >= jnp.maximum(top_k, top_p)[:, None]) & (z >= jnp.log(numbers.min_p)[:, None])

    any_filter = jnp.any((numbers.top_k > 0) | (numbers.top_p < 1) | (numbers.min_p > 0))
    allowed = lax.cond(any_filter, filtered, lambda z: jnp.ones(z.shape, bool), z)
    return _pick(z, allowed & (z > -jnp.inf), local_token_ids(logits.shape[1]), numbers, position)


def sample_candidates(
    logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"]
) -> Int[Array, " R"]:
    """Samples among the most likely tokens of every slice; exact, like sample_full.

    Rows whose allowed set may reach beyond the candidates are found on the device and redone by sample_full.
    Arguments and result as sample_full.
    """
    tokens, sufficient = _among_candidates(logits, numbers, position)
    redone = lax.cond(jnp.all(sufficient), lambda: tokens, lambda: sample_full(logits, numbers, position))
    return jnp.where(sufficient, tokens, redone)


def _among_candidates(
    logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"]
) -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
    """Tokens sampled among the candidates, and whether nothing outside them was allowed."""
    z = _scaled(logits, numbers.temperature)
    values, ids = _top_values(z, min(NUM_CANDIDATES, z.shape[1]))
    is_whole = values.shape[1] == z.shape[1]
    beyond = max_over_vocabulary(values[:, -1])  # nothing outside the candidates is larger
    values, ids = gather_candidates(values), gather_candidates(ids)
    values, order = lax.top_k(values, values.shape[1])
    ids = jnp.take_along_axis(ids, order, axis=1)

    last = jnp.clip(numbers.top_k - 1, 0, values.shape[1] - 1)
    kth = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    has_top_k, has_top_p = numbers.top_k > 0, numbers.top_p < 1
    top_k = jnp.where(has_top_k & (numbers.top_k <= values.shape[1]), kth, -jnp.inf)
    mass = jnp.where(values >= top_k[:, None], jnp.exp(values), 0.0)
    total = jnp.where(has_top_k, jnp.sum(mass, axis=-1), sum_over_vocabulary(jnp.sum(jnp.exp(z), axis=-1)))
    before = jnp.cumsum(mass, axis=-1) - mass
    inside = before < (numbers.top_p * total)[:, None]
    crossing = jnp.min(jnp.where(inside, values, jnp.inf), axis=-1)
    top_p = jnp.where(has_top_p, crossing, -jnp.inf)
    threshold = jnp.maximum(jnp.maximum(top_k, top_p), jnp.log(numbers.min_p))

    greedy_row = numbers.temperature < MIN_TEMPERATURE
    top_k_known = ~has_top_k | ((numbers.top_k <= values.shape[1]) & (kth > beyond))
    sufficient = ((threshold > beyond) & top_k_known) | greedy_row | is_whole
    allowed = (values >= threshold[:, None]) & (values > -jnp.inf)
    noise = jnp.where(greedy_row[:, None], 0.0, gumbel_noise(numbers.seed, position, ids))
    scores = jnp.where(allowed | greedy_row[:, None], values + noise, -jnp.inf)
    best = jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(scores == best, ids, _NO_ID), axis=-1), sufficient


def _top_values(x: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The `count` largest values of this slice with their global ids, best first, without sorting the vocabulary.

    They all lie in the `count` groups of 128 with the largest maxima.
    """
    rows, size = x.shape
    ids = local_token_ids(size)
    if size <= count * _GROUP:
        values, where = lax.top_k(x, count)
        return values, ids[where]
    padded = jnp.pad(x, ((0, 0), (0, -size % _GROUP)), constant_values=-jnp.inf)
    grouped = padded.reshape(rows, -1, _GROUP)
    _, groups = lax.top_k(jnp.max(grouped, axis=-1), count)
    groups = jnp.sort(groups, axis=-1)  # ascending ids, so that ties keep the lowest
    members = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(rows, -1)
    values, where = lax.top_k(members, count)
    group = jnp.take_along_axis(groups, where // _GROUP, axis=1)
    return values, ids[0] + group * _GROUP + where % _GROUP


def token_logprobs(logits: Float[Array, "R V"], token_ids: Int[Array, " R"], *, num_top: int) -> TokenLogprobArrays:
    """Raw log_softmax of the sampled tokens, their ranks, and the most likely tokens.

    Args:
      logits: float32[R, V / devices], this device's slice, before temperature and filters.
      token_ids: int32[R], the sampled tokens.
      num_top: how many of the most likely tokens to report.

    Returns:
      float32 natural logarithms; rank 1 is the most likely token, ties share the better rank.
    """
    ids = local_token_ids(logits.shape[1])
    best = max_over_vocabulary(jnp.max(logits, axis=-1))
    log_total = best + jnp.log(sum_over_vocabulary(jnp.sum(jnp.exp(logits - best[:, None]), axis=-1)))
    own = max_over_vocabulary(jnp.max(jnp.where(ids == token_ids[:, None], logits, -jnp.inf), axis=-1))
    rank = 1 + sum_over_vocabulary(jnp.sum(logits > own[:, None], axis=-1, dtype=jnp.int32))
    values, top_ids = _top_values(logits, min(num_top, logits.shape[1]))
    values, top_ids = gather_candidates(values), gather_candidates(top_ids)
    values, order = lax.top_k(values, min(num_top, values.shape[1]))
    top_ids = jnp.take_along_axis(top_ids, order, axis=1)
    return TokenLogprobArrays(own - log_total, rank, top_ids, values - log_total[:, None])
