"""The jitted sampler: a threshold and a Gumbel argmax over a vocabulary that is sharded over the mesh.

Owns: the filters, the four samplers (greedy, unfiltered, candidates, full) and log-probabilities. Nothing here sorts
the whole vocabulary, and no device sends its slice of the logits to another.
Does not know: requests, slots, models.

All functions run inside a shard_map over ("pipe", "tensor"); each device holds one slice of the vocabulary.

Let z = (logits - max) / temperature, so that the best token has z = 0. Every filter keeps the tokens {z >= threshold}
of its own threshold: first top-k (ties with the k-th token are kept), then top-p on the softmax over what top-k kept
(the token that crosses top_p is kept, and its ties), then min-p. No threshold exceeds 0, so the best token is always
allowed. The sampled token is the argmax of z + Gumbel noise over the allowed tokens, the lowest id on ties. Rows with a
temperature below MIN_TEMPERATURE are greedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxinfer.communication.collectives import (
    max_over_vocabulary,
    min_over_vocabulary,
    num_vocabulary_shards,
    sum_over_vocabulary,
    vocabulary_shard,
)
from jaxinfer.sampling.noise import gumbel_noise
from jaxinfer.sampling.threshold import largest_threshold
from jaxinfer.sampling.top_values import gathered, top_values

MIN_TEMPERATURE = 1e-5
NUM_CANDIDATES = 65
"""How many of the largest logits sample_candidates takes from every slice. The last one only bounds the logits outside,
so that top_k up to 64 is decided among the candidates (ties apart)."""
_NO_ID = jnp.iinfo(jnp.int32).max
_LARGEST = float(jnp.finfo(jnp.float32).max)
_ROUNDING = 1e-6
"""More than what equal logits differ by, as a share, once XLA has scaled them in arrays of different shapes: on CPUs up
to two units in the last place, which are 2.4e-7."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingNumbers:
    """The sampling settings of each row.

    Args:
      temperature: float32[R]; below MIN_TEMPERATURE the row is greedy.
      top_p: float32[R]; 1 turns the filter off.
      min_p: float32[R]; 0 turns the filter off.
      top_k: int32[R]; 0 turns the filter off.
      seed: uint32[R, 2], a 64-bit seed, low word first.
    """

    temperature: Float[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
    top_k: Int[Array, " R"]
    seed: UInt32[Array, "R 2"]

    @classmethod
    def unpack(cls, words: Int[Array, "R F"]) -> SamplingNumbers:
        """The settings from the int32 words into which wrappers/step_batch.py's pack_sampling has put them."""
        floats = lax.bitcast_convert_type(words[:, :3], jnp.float32)
        seed = lax.bitcast_convert_type(words[:, 4:6], jnp.uint32)
        return cls(temperature=floats[:, 0], top_p=floats[:, 1], min_p=floats[:, 2], top_k=words[:, 3], seed=seed)


class TokenLogprobArrays(NamedTuple):
    """Log-probabilities before temperature and filters: the sampled token's, its rank, and the K best tokens'."""

    logprob: Float[Array, " R"]
    rank: Int[Array, " R"]
    top_ids: Int[Array, "R K"]
    top_logprobs: Float[Array, "R K"]


def local_token_ids(local_size: int) -> Int[Array, " V"]:
    """The token ids of this device's slice of the vocabulary, which has local_size tokens."""
    return vocabulary_shard() * local_size + jnp.arange(local_size, dtype=jnp.int32)


def argmax_over_vocabulary(values: Float[Array, "R J"], token_ids: Int[Array, "*R J"]) -> Int[Array, " R"]:
    """The id of the largest value over all slices, the lowest id on ties."""
    token_ids = jnp.broadcast_to(token_ids, values.shape)
    best, winners = lax.platform_dependent(values, token_ids, cpu=_argmax_in_two_passes, default=_argmax_in_one_pass)
    if num_vocabulary_shards() == 1:  # nothing to compare, but XLA would run a kernel for the line below
        return winners
    return min_over_vocabulary(jnp.where(best == max_over_vocabulary(best), winners, _NO_ID))


def _argmax_in_two_passes(values: Float[Array, "R J"], token_ids: Int[Array, "R J"]) -> tuple[Array, Array]:
    """The largest value of this slice and the lowest id that has it, found by a max and a min.

    XLA's CPU backend vectorises reductions of one array only.
    """
    best = jnp.max(values, axis=-1)
    return best, jnp.min(jnp.where(values == best[:, None], token_ids, _NO_ID), axis=-1)


def _argmax_in_one_pass(values: Float[Array, "R J"], token_ids: Int[Array, "R J"]) -> tuple[Array, Array]:
    """The same by one reduction of pairs (value, id), for GPUs: half the kernels and half the reads.

    XLA fuses the computation of the values into it.
    """

    def better(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        wins = (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))
        return jnp.where(wins, one[0], other[0]), jnp.where(wins, one[1], other[1])

    return lax.reduce((values, token_ids), (jnp.float32(-jnp.inf), jnp.int32(_NO_ID)), better, (1,))


def greedy(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    """The most likely token of every row, the lowest id on ties.

    Args:
      logits: float32[R, V / devices], this device's slice.
    """
    return argmax_over_vocabulary(logits, local_token_ids(logits.shape[1]))


def _best_logit(logits: Float[Array, "R J"]) -> Float[Array, " R"]:
    """The largest logit of each row over all slices, clipped to a finite number, as _scaled must not see inf - inf."""
    return jnp.clip(max_over_vocabulary(jnp.max(logits, axis=-1)), -_LARGEST, _LARGEST)


def _scaled(
    logits: Float[Array, "R J"], best: Float[Array, " R"], temperature: Float[Array, " R"]
) -> Float[Array, "R J"]:
    """z = (logits - best) / temperature, at most 0, and -inf for a logit of -inf; greedy rows are not divided."""
    divisor = jnp.where(temperature < MIN_TEMPERATURE, 1.0, temperature)
    # Subtracting in this order makes every zero -0.0, so that all zeros have the same bits.
    return (best[:, None] - jnp.minimum(logits, _LARGEST)) / -divisor[:, None]


def _scores(
    z: Float[Array, "R J"],
    threshold: Float[Array, " R"],
    token_ids: Int[Array, "*R J"],
    numbers: SamplingNumbers,
    position: Int[Array, " R"],
) -> Float[Array, "R J"]:
    """The scores whose argmax is the sampled token: z plus noise where z >= threshold, else -inf.

    Greedy rows get no noise; their best token is always allowed, so its score is the largest.
    """
    random = (numbers.temperature >= MIN_TEMPERATURE)[:, None]
    noise = jnp.where(random, gumbel_noise(numbers.seed, position, token_ids), 0.0)
    return jnp.where(z >= threshold[:, None], z + noise, -jnp.inf)


def _filter_threshold(z: Float[Array, "R V"], numbers: SamplingNumbers, *, backend: str) -> Float[Array, " R"]:
    """The highest of the thresholds of top-k, top-p and min-p; the search for one that no row uses is skipped.

    The barriers keep that search conditional: if the branches of a conditional hold nothing but elementwise operations
    and reductions, XLA turns it into a select, for which both branches run.
    """
    off = jnp.full(z.shape[0], -jnp.inf)
    has_top_k, has_top_p = numbers.top_k > 0, numbers.top_p < 1

    def by_count() -> Array:
        count = numbers.top_k.astype(jnp.float32)
        return jnp.where(has_top_k, largest_threshold(z, floor=off, target=count, by_mass=False, backend=backend), off)

    def by_mass() -> Array:
        share = numbers.top_p
        found = largest_threshold(z, floor=top_k, target=share, by_mass=True, backend=backend)
        return jnp.where(has_top_p, found, off)

    top_k = lax.cond(jnp.any(has_top_k), lambda: lax.optimization_barrier(by_count()), lambda: off)
    top_p = lax.cond(jnp.any(has_top_p), lambda: lax.optimization_barrier(by_mass()), lambda: off)
    return jnp.maximum(jnp.maximum(top_k, top_p), jnp.log(numbers.min_p))


def sample_unfiltered(
    logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"], *, backend: str
) -> Int[Array, " R"]:
    """Samples where no row has a filter, so that no threshold is needed; arguments and result as sample_full."""
    z = _scaled(logits, _best_logit(logits), numbers.temperature)
    ids = local_token_ids(logits.shape[1])
    nothing = jnp.full(z.shape[0], -jnp.inf)
    return argmax_over_vocabulary(_scores(z, nothing, ids, numbers, position), ids)


def sample_full(
    logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"], *, backend: str
) -> Int[Array, " R"]:
    """Samples with any filters, searching the whole vocabulary for their thresholds.

    Args:
      logits: float32[R, V / devices], this device's slice.
      numbers: the sampling settings of each row.
      position: int32[R], index in its text of the token being sampled.
      backend: name of the kernel backend.

    Returns:
      int32[R] token ids, equal on all devices.
    """
    z = _scaled(logits, _best_logit(logits), numbers.temperature)
    threshold = _filter_threshold(z, numbers, backend=backend)
    ids = local_token_ids(logits.shape[1])
    return argmax_over_vocabulary(_scores(z, threshold, ids, numbers, position), ids)


def sample_candidates(
    logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"], *, backend: str
) -> Int[Array, " R"]:
    """Samples among the NUM_CANDIDATES most likely tokens of every slice, with the same result as sample_full.

    The candidates suffice unless a row may sample tokens beyond them, as with a large top_k or without filters. The
    device finds such rows and samples them with sample_full. Arguments and result as sample_full.
    """
    tokens, sufficient = _among_candidates(logits, numbers, position, backend=backend)

    def redone() -> Array:
        return jnp.where(sufficient, tokens, sample_full(logits, numbers, position, backend=backend))

    return lax.cond(jnp.all(sufficient), lambda: tokens, lambda: lax.optimization_barrier(redone()))


def _among_candidates(
    logits: Float[Array, "R V"], numbers: SamplingNumbers, position: Int[Array, " R"], *, backend: str
) -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
    """Tokens sampled among the candidates, and which rows are exact since no token outside them was allowed."""
    # lax.top_k orders 0.0 before -0.0, but they must tie.
    values, ids = top_values(jnp.where(logits == 0, 0.0, logits), min(NUM_CANDIDATES, logits.shape[1]), backend=backend)
    is_whole = values.shape[1] == logits.shape[1]
    best, last = lax.platform_dependent(values, cpu=_first_and_last_reduced, default=_first_and_last)
    beyond = max_over_vocabulary(last)  # nothing outside the candidates is larger
    values, ids = gathered(values, ids, backend=backend)
    best = jnp.clip(max_over_vocabulary(best), -_LARGEST, _LARGEST)
    beyond = _scaled(beyond[:, None], best, numbers.temperature)[:, 0] * (1 - _ROUNDING)
    values = _scaled(values, best, numbers.temperature)
    has_top_k, has_top_p = numbers.top_k > 0, numbers.top_p < 1

    place = jnp.arange(values.shape[1])
    top_k_is_inside = numbers.top_k <= len(place)
    kth = jnp.max(jnp.where(place == numbers.top_k[:, None] - 1, values, -jnp.inf), axis=-1)
    top_k = jnp.where(has_top_k & top_k_is_inside, kth, -jnp.inf)
    mass = jnp.where(values >= top_k[:, None], jnp.exp(values), 0.0)
    # The probability mass of the candidates before each one; jnp.cumsum is a loop on GPUs since JAX 0.12.
    before = jnp.sum(jnp.where(place < place[:, None], mass[:, None, :], 0.0), axis=-1)
    everything = sum_over_vocabulary(jnp.sum(jnp.exp(_scaled(logits, best, numbers.temperature)), axis=-1))
    total = jnp.where(has_top_k, before[:, -1] + mass[:, -1], everything)
    inside = before < (numbers.top_p * total)[:, None]
    crossing = jnp.min(jnp.where(inside, values, 0.0), axis=-1)
    top_p = jnp.where(has_top_p, crossing, -jnp.inf)
    threshold = jnp.maximum(jnp.maximum(top_k, top_p), jnp.log(numbers.min_p))

    top_k_known = ~has_top_k | (top_k_is_inside & (kth > beyond))
    greedy_row = numbers.temperature < MIN_TEMPERATURE
    sufficient = ((threshold > beyond) & top_k_known) | greedy_row | is_whole
    scores = _scores(values, threshold, ids, numbers, position)
    winners = jnp.where(scores == jnp.max(scores, axis=-1, keepdims=True), ids, _NO_ID)
    return jnp.min(winners, axis=-1), sufficient


def _first_and_last(values: Float[Array, "R K"]) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """The first and the last of each row's values, which are in descending order."""
    return values[:, 0], values[:, -1]


def _first_and_last_reduced(values: Float[Array, "R K"]) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """The same for CPUs, by a max and a min. With slices, XLA sorts all the values instead of finding a top-k.

    One row of 128 thousand values would then take 4 ms instead of 0.5 ms.
    """
    return jnp.max(values, axis=-1), jnp.min(values, axis=-1)


def token_logprobs(
    logits: Float[Array, "R V"], token_ids: Int[Array, " R"], *, num_top: int, backend: str
) -> TokenLogprobArrays:
    """The log_softmax of the raw logits for the sampled tokens, with their ranks, and for the most likely tokens.

    Args:
      logits: float32[R, V / devices], this device's slice, before temperature and filters.
      token_ids: int32[R], the sampled tokens.
      num_top: how many of the most likely tokens to report.
      backend: name of the kernel backend.

    Returns:
      Natural logarithms in float32. Rank 1 is the most likely token; tokens that tie share the better rank.
    """
    ids = local_token_ids(logits.shape[1])
    best = max_over_vocabulary(jnp.max(logits, axis=-1))
    log_total = best + jnp.log(sum_over_vocabulary(jnp.sum(jnp.exp(logits - best[:, None]), axis=-1)))
    place = (token_ids - ids[0])[:, None]
    found = jnp.take_along_axis(logits, jnp.clip(place, 0, logits.shape[1] - 1), axis=1)
    own = max_over_vocabulary(jnp.where((place >= 0) & (place < logits.shape[1]), found, -jnp.inf)[:, 0])
    rank = 1 + sum_over_vocabulary(jnp.sum(logits > own[:, None], axis=-1, dtype=jnp.int32))
    values, top_ids = top_values(logits, min(num_top, logits.shape[1]), backend=backend)
    values, top_ids = gathered(values, top_ids, backend=backend)
    top_logprobs = values[:, :num_top] - log_total[:, None]
    return TokenLogprobArrays(own - log_total, rank, top_ids[:, :num_top], top_logprobs)
