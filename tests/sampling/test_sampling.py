"""The sampler against plain numpy (allowed sets, distributions); equality of variants, batches and meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import MESH, lowered_for_gpu
from jax.sharding import PartitionSpec as P
from sampling_tools import BIG, GROUPED, MEDIUM, P_VALUE, SMALL, on_mesh, random_logits
from scipy import stats

from jaxinfer.communication.collectives import VOCABULARY
from jaxinfer.communication.mesh import make_mesh
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.sampling import sampling
from jaxinfer.sampling.sampling import NUM_CANDIDATES, SamplingNumbers
from jaxinfer.wrappers.decode_state import DecodeState
from jaxinfer.wrappers.pipeline import LogitRows
from jaxinfer.wrappers.sample_step import sample_step
from jaxinfer.wrappers.step_batch import SAMPLING_FIELDS, SamplerVariant, pack_sampling

FILTERS = {
    "plain": {},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_k_top_p": {"top_k": 12, "top_p": 0.9},
    "top_p_min_p": {"top_p": 0.95, "min_p": 0.05},
    "all": {"top_k": 20, "top_p": 0.93, "min_p": 0.02},
}


def numbers_of(num_rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None):
    """Per-row numbers; each is one value or num_rows of them. The default seed of row i is i."""
    full = lambda value, dtype: jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (num_rows,)))  # noqa: E731
    seeds = np.broadcast_to(np.asarray(np.arange(num_rows) if seed is None else seed, np.uint64), (num_rows,))
    words = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=1).astype(np.uint32)
    return SamplingNumbers(
        temperature=full(temperature, np.float32),
        top_p=full(top_p, np.float32),
        min_p=full(min_p, np.float32),
        top_k=full(top_k, np.int32),
        seed=jnp.asarray(words),
    )


def sample(variant, logits, numbers, position=0, *, backend="xla"):
    """int[R] tokens of the variant "full" or "candidates"."""
    logits = np.asarray(logits, np.float32)
    positions = jnp.asarray(np.broadcast_to(np.int32(position), logits.shape[:1]))
    sampler = on_mesh(getattr(sampling, f"sample_{variant}"), backend=backend)
    return np.asarray(sampler(jnp.asarray(logits), numbers, positions))


def among_candidates(logits, numbers, *, backend="xla"):
    """Tokens sampled among the candidates and whether the candidates sufficed."""
    positions = jnp.zeros(len(logits), jnp.int32)
    sampler = on_mesh(sampling._among_candidates, backend=backend)
    tokens, sufficient = sampler(jnp.asarray(logits, jnp.float32), numbers, positions)
    return np.asarray(tokens), np.asarray(sufficient)


def _allowed(logits, numbers, *, backend):
    z = sampling._scaled(logits, sampling._best_logit(logits), numbers.temperature)
    return z >= sampling._filter_threshold(z, numbers, backend=backend)[:, None]


def allowed_set(logits, numbers, *, backend="xla"):
    """bool[R, V]: what sample_full chooses from."""
    return np.asarray(on_mesh(_allowed, backend=backend)(jnp.asarray(logits, jnp.float32), numbers))


def reference_allowed(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """bool[V]: the filters in their order, on a sorted copy in float64."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    allowed = np.ones(len(logits), bool)
    if top_k > 0:
        allowed &= logits >= logits[order[min(top_k, len(logits)) - 1]]
    if top_p < 1:
        share = np.where(allowed, weights, 0.0)[order]
        share /= share.sum()
        before = np.cumsum(share) - share
        allowed &= logits >= logits[order[np.flatnonzero(before < top_p)[-1]]]
    return allowed & (weights >= min_p * weights.max())


def reference_probabilities(logits, *, temperature=1.0, **filters):
    """float64[V]: the softmax over the allowed set."""
    weights = np.exp((logits - logits.max()) / temperature)
    weights = np.where(reference_allowed(logits, temperature=temperature, **filters), weights, 0.0)
    return weights / weights.sum()


def assert_distributed_as(tokens, probabilities):
    """Chi-square of the counts, cells of less than 5 expected pooled; nothing outside the support."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected).pvalue > P_VALUE


def random_settings(rng, num_rows):
    """Numbers with every filter on or off, and the same as a list of keyword dictionaries."""
    some = lambda off, values: np.where(rng.random(num_rows) < 0.4, off, values)  # noqa: E731
    columns = {
        "temperature": rng.choice([0.05, 0.5, 1.0, 3.0], num_rows),
        "top_k": some(0, rng.choice([1, 5, 30, 64, 65, 200, 10**6], num_rows)),
        "top_p": some(1.0, rng.uniform(0.01, 0.999, num_rows)).astype(np.float32),
        "min_p": some(0.0, rng.uniform(0.0, 0.3, num_rows)).astype(np.float32),
    }
    rows = [{name: column[i].item() for name, column in columns.items()} for i in range(num_rows)]
    return numbers_of(num_rows, **columns), rows


# Distributions and allowed sets.


@pytest.mark.parametrize("variant", ["full", "candidates"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_sample_many_seeds_follow_reference_distribution(variant, filters):
    logits = np.random.default_rng(1).normal(size=SMALL) * 2
    settings = {"temperature": 0.8, **filters}
    tokens = sample(variant, np.tile(logits, (20_480, 1)), numbers_of(20_480, **settings))
    assert_distributed_as(tokens, reference_probabilities(logits, **settings))


def test_sample_many_positions_follow_reference_distribution():
    logits = np.random.default_rng(2).normal(size=SMALL) * 2
    numbers = numbers_of(20_480, temperature=1.3, top_p=0.9, seed=2**40 + 5)
    tokens = sample("full", np.tile(logits, (20_480, 1)), numbers, position=np.arange(20_480))
    assert_distributed_as(tokens, reference_probabilities(logits, temperature=1.3, top_p=0.9))


def test_sample_candidates_beyond_their_number_follow_reference_distribution():
    logits = np.random.default_rng(3).normal(size=MEDIUM) * 2
    tokens = sample("candidates", np.tile(logits, (20_480, 1)), numbers_of(20_480, top_k=40, top_p=0.95))
    assert_distributed_as(tokens, reference_probabilities(logits, top_k=40, top_p=0.95))


@pytest.mark.parametrize(("batch", "backend"), [*((batch, "xla") for batch in range(4)), (4, "pallas")])
def test_allowed_set_random_settings_and_ties_equal_reference(batch, backend):
    rng = np.random.default_rng(10 + batch)
    logits = random_logits(rng, 64, MEDIUM)
    numbers, rows = random_settings(rng, 64)
    expected = [reference_allowed(row, **settings) for row, settings in zip(logits, rows, strict=True)]
    np.testing.assert_array_equal(allowed_set(logits, numbers, backend=backend), np.stack(expected))


def test_allowed_set_top_p_crosses_a_tie_keeps_all_of_it():
    logits = np.log([[0.4, 0.15, 0.15, 0.15, 0.1, 0.05]])
    assert allowed_set(logits, numbers_of(1, top_p=0.5)).tolist() == [[True] * 4 + [False] * 2]


def test_allowed_set_top_p_is_of_what_top_k_left():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    # 0.4 / 0.7 is less than 0.6, 0.4 / 0.9 and 0.7 / 0.9 are too.
    assert allowed_set(logits, numbers_of(1, top_k=2, top_p=0.55)).tolist() == [[True, False, False, False]]
    assert allowed_set(logits, numbers_of(1, top_k=0, top_p=0.55)).tolist() == [[True, True, False, False]]


def test_allowed_set_top_p_underflows_keeps_best_and_its_ties():
    logits = np.array([[1.0, 3.0, 3.0, 2.0]] * 2)
    for variant in ("full", "candidates"):
        tokens = sample(variant, np.tile(logits[:1], (256, 1)), numbers_of(256, top_p=0.0))
        assert set(tokens.tolist()) == {1, 2}
    allowed = allowed_set(logits, numbers_of(2, top_p=[1e-6, 0.0]))
    assert allowed.tolist() == [[False, True, True, False]] * 2


def test_allowed_set_min_p_one_keeps_best_and_its_ties():
    logits = np.array([[1.0, 3.0, 3.0, 2.9999], [4.0, 3.0, 3.0, 2.9999]])
    allowed = allowed_set(logits, numbers_of(2, min_p=1.0))
    assert allowed.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_allowed_set_signed_zeros_tie():
    logits = np.array([[0.0, -0.0, -1.0, -2.0]])
    for settings in ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 1.0}):
        assert allowed_set(logits, numbers_of(1, **settings)).tolist() == [[True, True, False, False]]


def test_allowed_set_top_k_exceeds_vocabulary_keeps_everything():
    logits = np.random.default_rng(4).normal(size=(2, MEDIUM))
    assert allowed_set(logits, numbers_of(2, top_k=[MEDIUM, 2**31 - 1])).all()


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.5])
def test_allowed_set_big_vocabulary_holds_top_p_of_the_mass(spread):
    top_ps = np.array([0.99, 0.5], np.float32)
    logits = (np.random.default_rng(5).normal(size=(2, BIG)) * spread - 1.3).astype(np.float32)
    logits[:, 77] = logits.max() + 1
    allowed = allowed_set(logits, numbers_of(2, top_p=top_ps))
    for row, kept, top_p in zip(logits.astype(np.float64), allowed, top_ps.tolist(), strict=True):
        share = np.exp(row - row.max())
        share /= share.sum()
        if spread == 0:
            assert kept.all()  # all but one are ties
        else:
            crossing = share[kept].min()
            # 1e-4 is what a float32 sum of the vocabulary may be wrong by; measured 1e-6.
            assert top_p - 1e-4 <= share[kept].sum() <= top_p + crossing + 1e-4


def test_argmax_in_one_pass_and_in_two_yield_lowest_id():
    values = np.round(np.random.default_rng(18).normal(size=(64, MEDIUM)) * 2).astype(np.float32)
    values[0] = -np.inf
    ids = np.broadcast_to(np.arange(MEDIUM, dtype=np.int32), values.shape)
    for argmax in (sampling._argmax_in_one_pass, sampling._argmax_in_two_passes):
        best, winners = jax.jit(argmax)(jnp.asarray(values), jnp.asarray(ids))
        np.testing.assert_array_equal(winners, values.argmax(axis=1))
        np.testing.assert_array_equal(best, values.max(axis=1))


# Rows apart from the ordinary.


@pytest.mark.parametrize("variant", ["full", "candidates"])
def test_sample_extreme_temperatures_tend_to_greedy_and_uniform(variant):
    logits = np.tile(np.random.default_rng(6).normal(size=SMALL), (20_480, 1))
    cold = sample(variant, logits, numbers_of(20_480, temperature=1e-4))
    assert set(cold.tolist()) == {int(logits[0].argmax())}
    hot = sample(variant, logits, numbers_of(20_480, temperature=1e30))
    assert_distributed_as(hot, np.full(SMALL, 1 / SMALL))


def test_greedy_ties_yield_lowest_id():
    logits = np.round(np.random.default_rng(7).normal(size=(64, MEDIUM)) * 2)
    tokens = on_mesh(sampling.greedy)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("variant", ["full", "candidates"])
def test_sample_greedy_rows_among_random_ones_yield_argmax(variant):
    logits = np.round(np.random.default_rng(8).normal(size=(64, MEDIUM)) * 2)
    temperature = np.where(np.arange(64) % 2, 1.0, 0.0)
    filters = {"top_p": np.where(np.arange(64) % 3, 1.0, 0.3), "top_k": np.where(np.arange(64) % 5, 0, 3)}
    mixed = sample(variant, logits, numbers_of(64, temperature=temperature, **filters))
    np.testing.assert_array_equal(mixed[::2], logits.argmax(axis=1)[::2])
    random = sample(variant, logits, numbers_of(64, **filters))
    np.testing.assert_array_equal(mixed[1::2], random[1::2])


@pytest.mark.parametrize("variant", ["full", "candidates"])
def test_sample_greedy_rows_of_signed_zeros_yield_lowest_id(variant):
    logits = np.zeros((64, MEDIUM))
    logits[:, 0] = -0.0
    assert not sample(variant, logits, numbers_of(64, temperature=0.0, top_k=2)).any()


@pytest.mark.parametrize("variant", ["full", "candidates"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_sample_masked_columns_are_never_drawn(variant, filters):
    logits = np.random.default_rng(9).normal(size=(64, MEDIUM))
    logits[:, 3:] = -np.inf
    logits[:, -1] = 0.5
    tokens = sample(variant, logits, numbers_of(64, **{"temperature": 2.0, **filters}))
    assert set(tokens.tolist()) <= {0, 1, 2, MEDIUM - 1}


@pytest.mark.parametrize("variant", ["full", "candidates"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_sample_row_of_nothing_or_infinity_yields_token_zero_or_the_infinite(variant, filters):
    logits = np.zeros((64, MEDIUM))
    logits[:4] = -np.inf
    logits[4:8, 5] = np.inf
    temperature = np.where(np.arange(64) % 2, 1.0, 0.0)
    tokens = sample(variant, logits, numbers_of(64, temperature=temperature, **filters))
    assert tokens[:8].tolist() == [0] * 4 + [5] * 4


@pytest.mark.parametrize("variant", list(SamplerVariant))
def test_sample_step_nan_logits_never_win(variant):
    head = VocabularyEmbedding(6, 2, num_shards=1, dtype=jnp.dtype(jnp.float32))
    head.weight[...] = jnp.asarray([[1, 0], [2, 0], [np.nan, 0], [50, 0], [0, 0], [0, 0]], jnp.float32)
    hidden = jnp.asarray([[1, 0], [np.nan, 0], [1, 0]], jnp.float32)
    words = [pack_sampling(temperature=t, top_k=0, top_p=1.0, min_p=0.0, seed=1) for t in (1.0, 1.0, 0.0)]
    slots = jnp.arange(3, dtype=jnp.int32)
    zeros, ones = jnp.zeros(3, jnp.int32), jnp.ones(3, jnp.int32)
    rows = LogitRows(index=slots, position=zeros, sampling=jnp.stack(words), slot=slots, feeds=ones)

    def step(state, hidden, rows):
        state, _, columns = sample_step(head, state, None, hidden, rows, variant=variant, num_top=20)
        return state, columns

    call = jax.shard_map(step, mesh=make_mesh(), in_specs=P(), out_specs=P(), check_vma=False)
    state, columns = jax.jit(call)(DecodeState.zeros(3, 1), hidden, rows)
    assert columns[:, 0].tolist() == [3, 0, 3]
    assert state.last_token[:3].tolist() == [3, 0, 3]


# Candidates and full are one sampler.


@pytest.mark.parametrize(
    ("vocab_size", "num_rows", "batches", "backend"),
    [
        (MEDIUM, 64, 8, "xla"),
        (GROUPED, 8, 3, "xla"),
        pytest.param(MEDIUM, 16, 4, "pallas", marks=pytest.mark.matrix),
        pytest.param(GROUPED, 4, 1, "pallas", marks=pytest.mark.matrix),
    ],
)
def test_sample_candidates_random_settings_equal_full(vocab_size, num_rows, batches, backend):
    enough = []
    for batch in range(batches):
        rng = np.random.default_rng(100 + batch)
        logits = random_logits(rng, num_rows, vocab_size)
        numbers, _ = random_settings(rng, num_rows)
        full = sample("full", logits, numbers)
        np.testing.assert_array_equal(sample("candidates", logits, numbers, backend=backend), full)
        tokens, sufficient = among_candidates(logits, numbers, backend=backend)
        np.testing.assert_array_equal(tokens[sufficient], full[sufficient])
        enough.append(sufficient)
    assert 0.2 < np.mean(enough) < 0.9  # both ways are taken


def test_sample_candidates_flat_big_vocabulary_redone_by_full():
    logits = np.random.default_rng(11).normal(size=(2, BIG)) * 0.01
    numbers = numbers_of(2, top_p=0.99)
    assert not among_candidates(logits, numbers)[1].any()
    np.testing.assert_array_equal(sample("candidates", logits, numbers), sample("full", logits, numbers))


def test_among_candidates_nucleus_beyond_them_does_not_suffice_at_any_temperature():
    """XLA may scale a logit among the candidates and the same logit as their border to neighbouring numbers."""
    logits = np.random.default_rng(13).normal(size=(64, MEDIUM))
    for temperature in np.linspace(0.5, 2.0, 31):
        numbers = numbers_of(64, temperature=temperature, top_p=0.9)
        assert not among_candidates(logits * temperature, numbers)[1].any(), temperature


def test_among_candidates_top_k_at_their_number_suffices_up_to_it():
    logits = np.random.default_rng(12).normal(size=(64, MEDIUM))
    top_k = np.arange(64) + 2
    _, sufficient = among_candidates(logits, numbers_of(64, top_k=top_k))
    np.testing.assert_array_equal(sufficient, top_k < NUM_CANDIDATES)


def test_among_candidates_ties_across_their_border_do_not_suffice():
    logits = np.zeros((64, MEDIUM))
    logits[:, :3] = 5
    _, sufficient = among_candidates(logits, numbers_of(64, top_k=np.where(np.arange(64) < 32, 3, 4)))
    np.testing.assert_array_equal(sufficient, np.arange(64) < 32)


def test_sample_unfiltered_equals_full():
    rng = np.random.default_rng(19)
    logits = random_logits(rng, 64, MEDIUM)
    logits[:3] = -np.inf
    numbers = numbers_of(64, temperature=rng.choice([0.0, 0.05, 1.0, 3.0], 64))
    np.testing.assert_array_equal(sample("unfiltered", logits, numbers, 7), sample("full", logits, numbers, 7))


# What the token may depend on.


@pytest.mark.parametrize("variant", ["full", "candidates"])
def test_sample_any_batch_and_row_order_yields_same_token(variant):
    rng = np.random.default_rng(13)
    logits = random_logits(rng, 64, MEDIUM)
    numbers, _ = random_settings(rng, 64)
    tokens = sample(variant, logits, numbers, position=np.arange(64))
    for rows in (rng.permutation(64), np.arange(64)[20:28]):
        picked = jax.tree.map(lambda x, rows=rows: x[rows], numbers)
        np.testing.assert_array_equal(sample(variant, logits[rows], picked, position=rows), tokens[rows])


def test_sample_other_position_or_seed_yields_other_tokens():
    logits = np.zeros((64, MEDIUM))
    first = sample("full", logits, numbers_of(64))
    for other in (sample("full", logits, numbers_of(64), position=1), sample("full", logits, numbers_of(64, seed=99))):
        assert np.mean(first == other) < 0.1


@pytest.mark.parametrize(("backend", "num_rows"), [("xla", 32), pytest.param("pallas", 6, marks=pytest.mark.matrix)])
def test_sample_vocabulary_over_eight_devices_yields_same_tokens(backend, num_rows):
    rng = np.random.default_rng(14)
    logits = random_logits(rng, num_rows, 1000)
    logits[:, 990:] = -np.inf
    numbers, _ = random_settings(rng, num_rows)
    position = jnp.arange(num_rows, dtype=jnp.int32)

    def everything(logits, numbers, position):
        full = sampling.sample_full(logits, numbers, position, backend=backend)
        fast = sampling.sample_candidates(logits, numbers, position, backend=backend)
        return sampling.greedy(logits), full, fast, sampling.token_logprobs(logits, full, num_top=20, backend=backend)

    results = []
    for pipe, tensor in ((1, 1), (2, 4)):
        mesh = make_mesh(pipeline_parallel_size=pipe, tensor_parallel_size=tensor)
        specs = (P(None, VOCABULARY), P(), P())
        call = jax.jit(jax.shard_map(everything, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
        results.append(jax.tree.map(np.asarray, call(logits, numbers, position)))
    (greedy, full, fast, one), (*other, eight) = results
    for a, b in zip((greedy, full, fast), other, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(full, fast)
    np.testing.assert_array_equal(greedy, logits.argmax(axis=1))
    assert full.max() < 990
    np.testing.assert_array_equal(one.rank, eight.rank)
    np.testing.assert_array_equal(one.top_ids, eight.top_ids)
    # Only the order of the float32 additions in the normaliser differs.
    np.testing.assert_allclose(one.logprob, eight.logprob, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one.top_logprobs, eight.top_logprobs, rtol=1e-6, atol=1e-6)


# Log-probabilities.


_twenty_logprobs = functools.partial(sampling.token_logprobs, num_top=20, backend="xla")


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(MEDIUM, 64), (GROUPED, 8), (BIG, 2)])
def test_token_logprobs_random_rows_equal_float64(vocab_size, num_rows):
    rng = np.random.default_rng(15)
    logits = (rng.normal(size=(num_rows, vocab_size)) * rng.choice([0.1, 1.0, 6.0], (num_rows, 1))).astype(np.float32)
    logits += rng.choice([0.0, 1000.0], (num_rows, 1))
    tokens = rng.integers(0, vocab_size, num_rows)
    found = on_mesh(_twenty_logprobs)(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32))
    expected = log_softmax(logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    own = np.take_along_axis(expected, tokens[:, None], axis=1)
    # float32 rounds logits of 1000 to 6e-5.
    np.testing.assert_allclose(found.logprob, own[:, 0], rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(found.rank, 1 + (expected > own).sum(axis=1))
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(expected, order, axis=1), rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(
        np.take_along_axis(logits, np.asarray(found.top_ids), axis=1), np.take_along_axis(logits, order, axis=1)
    )
    assert all(len(set(ids)) == 20 for ids in np.asarray(found.top_ids).tolist())


def test_token_logprobs_ties_share_better_rank_and_list_lowest_id_first():
    logits = np.full((64, MEDIUM), -3.0, np.float32)
    logits[:, [9, 30, 200]] = 2.0
    logits[:, 100] = 4.0
    tokens = np.tile([100, 9, 200, 0], 16)
    found = on_mesh(_twenty_logprobs)(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32))
    assert found.rank[:4].tolist() == [1, 2, 2, 5]
    assert found.top_ids[0, :6].tolist() == [100, 9, 30, 200, 0, 1]


def test_token_logprobs_masked_vocabulary_counts_for_nothing():
    logits = np.full((64, MEDIUM), -np.inf, np.float32)
    logits[:, 5], logits[:, 6] = np.log(0.25), np.log(0.75)
    found = on_mesh(_twenty_logprobs)(jnp.asarray(logits), jnp.full(64, 5, jnp.int32))
    np.testing.assert_allclose(np.exp(found.logprob), 0.25, rtol=1e-6)
    assert found.rank[0] == 2
    assert found.top_ids[0, :2].tolist() == [6, 5]
    assert np.isneginf(found.top_logprobs[0, 2:]).all()
    assert (np.asarray(found.top_ids) < MEDIUM).all()


# How it compiles.


def _sampler_of_words(name, backend="xla", mesh=None):
    """The sampler on packed numbers, as shapes (which SamplingNumbers' checked constructor refuses) can be lowered."""

    def call(logits, words, position):
        return getattr(sampling, name)(logits, SamplingNumbers.unpack(words), position, backend=backend)

    return on_mesh(call, mesh=mesh)


def shapes(num_rows, vocab_size):
    shape = jax.ShapeDtypeStruct
    return (
        shape((num_rows, vocab_size), jnp.float32),
        shape((num_rows, SAMPLING_FIELDS), jnp.int32),
        shape((num_rows,), jnp.int32),
    )


SORTS = r"stablehlo.while|stablehlo.sort|chlo.top_k|custom_call @\w*TopK"
"""A loop breaks a command graph; a GPU sorts in dozens of kernels."""


@pytest.mark.parametrize(
    ("name", "num_conditionals"), [("sample_unfiltered", 0), ("sample_full", 2), ("sample_candidates", 3)]
)
def test_samplers_lowered_for_gpu_neither_loop_nor_sort(name, num_conditionals):
    text = lowered_for_gpu(_sampler_of_words(name, "pallas", MESH), *shapes(2, BIG))
    assert not re.findall(SORTS, text)
    assert text.count("stablehlo.optimization_barrier") == num_conditionals  # without it XLA runs both branches


def test_token_logprobs_lowered_for_gpu_neither_loops_nor_sorts():
    logits, _, tokens = shapes(2, BIG)

    def text(num_top):
        logprobs = on_mesh(sampling.token_logprobs, mesh=MESH, num_top=num_top, backend="pallas")
        return lowered_for_gpu(logprobs, logits, tokens)

    assert not re.findall(SORTS, text(20))
    assert re.findall(SORTS, text(500))


@pytest.mark.parametrize("name", ["sample_candidates", "sample_full"])
def test_samplers_compiled_hold_few_copies_of_the_logits(name):
    logits, *rest = shapes(8, GROUPED)
    compiled = _sampler_of_words(name).lower(logits, *rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * logits.size * 4
