"""The noise against known answers, plain Python and the distributions that it must have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from sampling_tools import MEDIUM, P_VALUE
from scipy import stats

from jaxinfer.sampling import noise

# Random123's kat_vectors, threefry2x32 with 20 rounds: key, counter, first word of the result.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), 0x6B200159),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0x1CB996FC),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
]


def threefry_reference(key, counter):
    """Threefry-2x32-20 on Python integers, one block at a time."""
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x0, x1 = (counter[0] + keys[0]) % 2**32, (counter[1] + keys[1]) % 2**32
    for i in range(20):
        rotation = [13, 15, 26, 6, 17, 29, 16, 24][i % 8]
        x0 = (x0 + x1) % 2**32
        x1 = ((x1 << rotation | x1 >> (32 - rotation)) % 2**32) ^ x0
        if i % 4 == 3:
            step = i // 4 + 1
            x0, x1 = (x0 + keys[step % 3]) % 2**32, (x1 + keys[(step + 1) % 3] + step) % 2**32
    return x0


bits_of = jax.jit(noise.random_bits)
noise_of = jax.jit(noise.gumbel_noise)


def bits_table(num_seeds, num_positions, num_ids):
    """uint32[seeds, positions, ids] of the first ones of each."""
    seeds, positions = np.divmod(np.arange(num_seeds * num_positions), num_positions)
    seeds = jnp.asarray(np.stack([seeds, np.zeros_like(seeds)], axis=1), jnp.uint32)
    bits = bits_of(seeds, jnp.asarray(positions, jnp.int32), jnp.arange(num_ids, dtype=jnp.int32))
    return np.asarray(bits).reshape(num_seeds, num_positions, num_ids)


def signed(words):
    return jnp.asarray(np.asarray(words, np.uint32).view(np.int32))


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_random_bits_known_answer_vectors_match(key, counter, expected):
    assert threefry_reference(key, counter) == expected
    bits = bits_of(jnp.asarray([key], jnp.uint32), signed(counter[:1]), signed(counter[1:]))
    assert int(bits[0, 0]) == expected


def test_random_bits_random_counters_equal_plain_python_and_jax():
    words = np.random.default_rng(0).integers(0, 2**32, (20, 4), dtype=np.uint32)
    bits = np.asarray(bits_of(jnp.asarray(words[:, :2]), signed(words[:, 2]), signed(words[:, 3:])))[:, 0]
    for row, value in zip(words, bits.tolist(), strict=True):
        assert value == threefry_reference(row[:2].tolist(), row[2:].tolist())
        assert value == int(threefry_2x32(jnp.asarray(row[:2]), jnp.asarray(row[2:]))[0])


def test_gumbel_noise_slice_of_ids_is_slice_of_noise():
    seed, position = jnp.asarray([[1, 2], [3, 4]], jnp.uint32), jnp.asarray([5, 6], jnp.int32)
    ids = jnp.arange(MEDIUM, dtype=jnp.int32)
    whole = noise_of(seed, position, ids)
    np.testing.assert_array_equal(whole[:, 100:300], noise_of(seed, position, ids[100:300]))
    np.testing.assert_array_equal(whole[1:], noise_of(seed[1:], position[1:], ids))
    picked = jnp.asarray([[7, 3], [399, 0]], jnp.int32)
    np.testing.assert_array_equal(jnp.take_along_axis(whole, picked, axis=1), noise_of(seed, position, picked))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_random_bits_every_byte_uniform(shift):
    counts = np.bincount((bits_table(16, 16, 400).ravel() >> shift) & 255, minlength=256)
    assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "token_ids"])
def test_random_bits_neighbours_independent(axis):
    bits = np.moveaxis(bits_table(48, 48, 48), axis, 0)
    one, other = bits[:-1].ravel(), bits[1:].ravel()
    correlation = np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(one.size)  # four standard errors
    pairs = np.bincount((one >> 28) * 16 + (other >> 28), minlength=256)
    assert stats.chisquare(pairs).pvalue > P_VALUE


def test_random_bits_high_seed_word_and_swapped_words_differ():
    seed = jnp.asarray([[7, 0], [7, 1], [0, 7], [1, 7]], jnp.uint32)
    bits = np.asarray(bits_of(seed, jnp.zeros(4, jnp.int32), jnp.arange(64, dtype=jnp.int32)))
    assert len(np.unique(bits)) == bits.size


def test_gumbel_noise_many_draws_is_standard_gumbel():
    seeds = jnp.asarray(np.stack([np.arange(256), np.ones(256)], axis=1), jnp.uint32)
    draws = np.asarray(noise_of(seeds, jnp.zeros(256, jnp.int32), jnp.arange(400, dtype=jnp.int32)), np.float64).ravel()
    error = 4 / math.sqrt(draws.size)  # four standard errors of the mean of a unit variance
    assert draws.mean() == pytest.approx(np.euler_gamma, abs=error * math.pi / math.sqrt(6))
    assert draws.var() == pytest.approx(math.pi**2 / 6, rel=error * math.sqrt(4.4))  # 4.4: Gumbel's kurtosis less 1
    assert stats.kstest(draws, stats.gumbel_r.cdf).pvalue > P_VALUE


@pytest.mark.parametrize("bits", [0, 1, 2**24 - 1, 2**24 + 1, 2**32 - 2**8, 2**32 - 1])
def test_gumbel_noise_extreme_bits_is_finite_and_accurate(monkeypatch, bits):
    monkeypatch.setattr(noise, "random_bits", lambda *_: jnp.full((1, 1), bits, jnp.uint32))
    found = noise.gumbel_noise(jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    uniform = min((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)
    assert float(found[0, 0]) == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-5, abs=1e-5)
