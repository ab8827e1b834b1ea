"""Beam search: the texts and scores of transformers, the best of all texts where every text is looked at, greedy at
width 1, and the rules that a small example shows one at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from conftest import GOLDEN
from scipy.special import log_softmax
from wrapper_tools import make_wrapper, prefill_step

from jaxinfer.engine.beam_search import BeamCandidates, BeamGroup, Hypothesis
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper

Logprobs = Callable[[tuple[int, ...]], np.ndarray]
"""Log-probabilities float64[V] of the token after a generated text."""

CASES = json.loads((GOLDEN / "beam" / "cases.json").read_text())


def most_likely(logprobs: np.ndarray, count: int) -> BeamCandidates:
    token_ids = np.argsort(-logprobs, kind="stable")[:count]
    return BeamCandidates(token_ids=token_ids.tolist(), logprobs=logprobs[token_ids].tolist())


def search(group: BeamGroup, logprobs: Logprobs, num_candidates: int | None = None) -> tuple[Hypothesis, ...]:
    """Runs a group to its end; returns all it found."""
    texts: list[tuple[int, ...]] = [()]
    while texts:
        candidates = [most_likely(logprobs(text), num_candidates or group.num_candidates) for text in texts]
        texts = [(*texts[step.parent], step.token_id) for step in group.advance(candidates)]
    return group.hypotheses(1000)


@cache
def wrapper_of(checkpoint: str) -> DecoderWrapper:
    return make_wrapper(GOLDEN / checkpoint, max_model_len=64, max_num_batched_tokens=64)


def model_logprobs(checkpoint: str, prompt: Sequence[int]) -> Logprobs:
    wrapper = wrapper_of(checkpoint)

    def logprobs(text: tuple[int, ...]) -> np.ndarray:
        logits = wrapper.logits(prefill_step(wrapper, [*prompt, *text]))[0]
        return log_softmax(logits.astype(np.float64))

    return logprobs


def group_of(case: dict) -> BeamGroup:
    names = ("beam_width", "max_tokens", "length_penalty", "early_stopping")
    return BeamGroup(**{name: case[name] for name in names}, stop_token_ids=frozenset(case["eos"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['checkpoint']}-{len(case['prompt'])}")
def test_beam_group_golden_case_equals_transformers(case, few_programs) -> None:
    found = search(group_of(case), model_logprobs(case["checkpoint"], case["prompt"]))[: case["num_return_sequences"]]
    assert [list(hypothesis.token_ids) for hypothesis in found] == case["sequences"]
    # The forward passes are float32, ours and theirs: a sum of up to 24 log-probabilities differs by some 1e-5, its
    # product with the length (length_penalty -1) by some 1e-4.
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], case["scores"], atol=1e-3)
    ended = [hypothesis.token_ids[-1] in case["eos"] for hypothesis in found]
    assert [hypothesis.finish_reason for hypothesis in found] == [["length", "stop"][stop] for stop in ended]


NUM_TOKENS = 5
END = 4


def chain(seed: int) -> Logprobs:
    """A Markov chain over NUM_TOKENS tokens."""
    table = log_softmax(np.random.default_rng(seed).normal(0, 1.5, (NUM_TOKENS + 1, NUM_TOKENS)), axis=-1)
    return lambda text: table[text[-1] if text else NUM_TOKENS]


def all_texts(logprobs: Logprobs, max_tokens: int, length_penalty: float) -> dict[tuple[int, ...], float]:
    """Every text that ends at END or at max_tokens, with its score."""
    lengths = range(1, max_tokens + 1)
    texts = (text for length in lengths for text in itertools.product(range(NUM_TOKENS), repeat=length))
    finished = [text for text in texts if END not in text[:-1] and (text[-1] == END or len(text) == max_tokens)]
    return {
        text: sum(logprobs(text[:i])[token_id] for i, token_id in enumerate(text)) / len(text) ** length_penalty
        for text in finished
    }


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("max_tokens", [1, 2, 4])
def test_beam_group_as_wide_as_all_texts_equals_brute_force(max_tokens, length_penalty, early_stopping) -> None:
    logprobs = chain(max_tokens)
    group = BeamGroup(
        beam_width=NUM_TOKENS**max_tokens,
        max_tokens=max_tokens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_token_ids=frozenset({END}),
    )
    found = {hypothesis.token_ids: hypothesis.score for hypothesis in search(group, logprobs)}
    expected = all_texts(logprobs, max_tokens, length_penalty)
    assert found == pytest.approx(expected, rel=1e-12)  # sums of the same float64 numbers
    assert next(iter(found)) == max(expected, key=expected.__getitem__)
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_beam_group_of_width_one_is_greedy(seed: int, early_stopping) -> None:
    logprobs = chain(seed)
    greedy: list[int] = []
    while len(greedy) < 6 and END not in greedy:
        greedy.append(int(logprobs(tuple(greedy)).argmax()))
    group = BeamGroup(beam_width=1, max_tokens=6, early_stopping=early_stopping, stop_token_ids=frozenset({END}))
    (found,) = search(group, logprobs)
    assert found.token_ids == tuple(greedy)
    assert found.finish_reason == ("stop" if greedy[-1] == END else "length")


@pytest.mark.parametrize("num_ends", [0, 1, 3])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_group_num_candidates_decide_like_whole_vocabulary(early_stopping, num_ends: int) -> None:
    table = log_softmax(np.random.default_rng(num_ends).normal(0, 1, (40, 40)), axis=-1)
    table[:, :num_ends] += 2  # end tokens crowd the best places
    fields = {"beam_width": 3, "max_tokens": 12, "length_penalty": 1.5, "early_stopping": early_stopping}
    groups = [BeamGroup(**fields, stop_token_ids=frozenset(range(num_ends))) for _ in range(2)]
    assert groups[0].num_candidates == 3 + num_ends

    def logprobs(text: tuple[int, ...]) -> np.ndarray:
        return table[text[-1] if text else 39]

    assert search(groups[0], logprobs) == search(groups[1], logprobs, num_candidates=40)


def candidates(*logprobs: float) -> BeamCandidates:
    """Tokens 0, 1, .. with these log-probabilities."""
    return BeamCandidates(token_ids=list(range(len(logprobs))), logprobs=list(logprobs))


def advance(group: BeamGroup, *candidates: BeamCandidates) -> list[tuple[int, int]]:
    return [(step.parent, step.token_id) for step in group.advance(candidates)]


def test_beam_group_end_token_behind_beam_width_best_does_not_finish() -> None:
    group = BeamGroup(beam_width=2, max_tokens=9, stop_token_ids=frozenset({2}))
    assert advance(group, candidates(-1.0, -2.0, -3.0, -4.0)) == [(0, 0), (0, 1)]
    assert group.hypotheses(2) == ()


def test_beam_group_end_token_among_best_leaves_its_place_to_next() -> None:
    group = BeamGroup(beam_width=2, max_tokens=9, stop_token_ids=frozenset({0}))
    assert advance(group, candidates(-1.0, -2.0, -3.0, -4.0)) == [(0, 1), (0, 2)]
    assert group.hypotheses(2) == (Hypothesis(token_ids=(0,), score=-1.0, finish_reason="stop"),)


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "goes_on"),
    [(True, 1.0, False), (False, 1.0, False), ("never", 1.0, True), ("never", 0.0, False), ("never", -1.0, False)],
)
def test_beam_group_full_of_finished_ends_as_early_stopping_says(early_stopping, length_penalty, goes_on) -> None:
    group = BeamGroup(
        beam_width=2,
        max_tokens=9,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_token_ids=frozenset({0, 1}),
    )
    assert bool(advance(group, candidates(-1.0, -2.0, -3.0, -4.0))) == goes_on
    assert [hypothesis.token_ids for hypothesis in group.hypotheses(2)] == [(0,), (1,)]


@pytest.mark.parametrize(("early_stopping", "goes_on"), [(True, False), (False, True), ("never", True)])
def test_beam_group_best_live_beam_beats_worst_finished_only_if_short(early_stopping, goes_on: bool) -> None:
    group = BeamGroup(
        beam_width=2, max_tokens=9, length_penalty=-1.0, early_stopping=early_stopping, stop_token_ids=frozenset({0})
    )
    assert advance(group, candidates(-1.0, -1.5, -8.0)) == [(0, 1), (0, 2)]
    # The worst finished text gets 2 * -4.5; the best live beam has 2 * -1.75 now, and would have 9 * -1.75 at the end.
    assert bool(advance(group, candidates(-3.0, -0.25, -9.0), candidates(-9.0, -9.0, -9.0))) == goes_on
    assert [hypothesis.score for hypothesis in group.hypotheses(2)] == [-1.0, -9.0]


def test_beam_group_ties_go_to_earlier_beam_then_lower_id() -> None:
    group = BeamGroup(beam_width=2, max_tokens=2, length_penalty=0.0, stop_token_ids=frozenset({3}))
    assert advance(group, BeamCandidates(token_ids=[5, 1, 3, 4], logprobs=[-1.0, -1.0, -2.0, -9.0])) == [(0, 1), (0, 5)]
    assert advance(group, candidates(-1.0, -1.0), candidates(-1.0, -1.0)) == []
    assert [hypothesis.token_ids for hypothesis in group.hypotheses(2)] == [(1, 0), (1, 1)]


def test_beam_group_tie_of_finished_texts_older_stays_first() -> None:
    group = BeamGroup(beam_width=2, max_tokens=2, length_penalty=0.0, stop_token_ids=frozenset({1}))
    assert advance(group, candidates(-1.0, -2.0, -3.0)) == [(0, 0), (0, 2)]
    assert advance(group, candidates(-1.0, -9.0), candidates(-9.0, -9.0)) == []
    assert [hypothesis.token_ids for hypothesis in group.hypotheses(2)] == [(1,), (0, 0)]


def test_beam_group_vocabulary_of_ends_only_ends() -> None:
    group = BeamGroup(beam_width=4, max_tokens=9, stop_token_ids=frozenset({0, 1}))
    assert advance(group, candidates(-1.0, -2.0)) == []
    assert len(group.hypotheses(4)) == 2


def test_beam_group_wrong_number_of_candidates_raises() -> None:
    group = BeamGroup(beam_width=2, max_tokens=3)
    with pytest.raises(ValueError, match="advance takes candidates of 1 live beams, got 2"):
        group.advance([candidates(-1.0)] * 2)
