"""Drafts change the number of steps and nothing else, however right they are."""

import dataclasses
import itertools

import numpy as np
import pytest
from engine_tools import (
    assert_own_texts,
    finish,
    make_engine,
    plain_search,
    request,
    run_all,
    token_logprobs,
    tokens_of,
)
from fake_policies import Scripted, partly, right, wrong
from fake_wrapper import VOCAB_SIZE, continuation, logprobs

from jaxinfer.constraints.constraint import TokenSet
from jaxinfer.engine.drafting import PromptLookup
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.sampling_params import BeamSearchParams
from jaxinfer.wrappers.step_shapes import pages_for

STOP = frozenset(range(0, 97, 9))


class Late(Scripted):
    """Plans placeholders."""

    def plan(self, sequence, most):
        return [0] * min(most, self._num_tokens)

    def complete(self, schedule):
        chunks = [
            dataclasses.replace(chunk, token_ids=[chunk.token_ids[0], *self._text(chunk.sequence, len(chunk.drafts))])
            if chunk.drafts
            else chunk
            for chunk in schedule.prefills
        ]
        return dataclasses.replace(schedule, prefills=tuple(chunks))


def requests_of(max_tokens=20, **fields):
    lengths = [1, 7, 8, 9, 22]
    return [
        request(n, [n, *range(1, length)], max_tokens, top_k=2, seed=n, **fields) for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(("stages", "run_ahead"), [(1, True), (1, False), (2, True), (4, True)])
@pytest.mark.parametrize("drafter", [Scripted(right), Scripted(wrong), Scripted(partly), Late(partly), PromptLookup(3)])
def test_drafts_of_any_quality_leave_texts_alone(drafter, stages, run_ahead):
    engine, _ = make_engine(drafter=drafter, pipeline_parallel_size=stages, run_ahead=run_ahead)
    requests = requests_of()
    assert_own_texts(run_all(engine, requests, want_events=True), requests)


def test_drafts_leave_log_probabilities_alone():
    engine, _ = make_engine(drafter=Scripted(partly))
    events = run_all(engine, [request(0, [1, 2], 20, logprobs=3)], want_events=True)
    text = [1, 2]
    for event in events:
        assert event.logprobs == token_logprobs(logprobs(text), event.token_id, 3)
        text.append(event.token_id)


@pytest.mark.parametrize(("quality", "accepted"), [(right, 16), (wrong, 0)])
def test_drafts_are_counted(quality, accepted):
    engine, _ = make_engine(drafter=Scripted(quality), run_ahead=False)
    run_all(engine, [request(0, [1, 2], 21)])
    stats = engine.stats()
    assert stats.accepted_draft_tokens == accepted
    # Right: one token for the prompt, then 4 + 1 at a time. Wrong: 20 one by one, the last ones with less room.
    assert stats.draft_tokens == (16 if accepted else 16 * 4 + 3 + 2 + 1 + 0)
    assert stats.num_steps == (5 if accepted else 21)
    assert stats.generation_tokens == 21
    assert stats.draft_acceptance_rate == accepted / stats.draft_tokens


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("quality", [right, partly])
@pytest.mark.parametrize("first", range(8))
def test_drafts_behind_a_stop_token_are_dropped(first, quality, run_ahead):
    engine, _ = make_engine(drafter=Scripted(quality), run_ahead=run_ahead)
    entry = request(0, [first, 2, 3], 40, stop_token_ids=STOP)
    events = run_all(engine, [entry], want_events=True)
    assert_own_texts(events, [entry])
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]


@pytest.mark.parametrize("quality", [right, wrong])
@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_drafts_end_at_max_tokens(max_tokens, quality):
    engine, _ = make_engine(drafter=Scripted(quality))
    events = run_all(engine, [request(0, [1, 2], max_tokens)], want_events=True)
    assert [event.token_id for event in events] == continuation([1, 2], max_tokens)
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("prompt_len", range(26, 32))
def test_drafts_end_at_max_model_len(prompt_len):
    engine, _ = make_engine(drafter=Scripted(right), max_model_len=32, num_kv_pages=4)
    events = run_all(engine, [request(0, range(prompt_len), 50)], want_events=True)
    assert [event.token_id for event in events] == continuation(range(prompt_len), 32 - prompt_len)


@pytest.mark.parametrize("quality", [right, wrong, partly])
def test_drafts_rejected_give_their_pages_back(quality):
    engine, _ = make_engine(drafter=Scripted(quality, num_tokens=15), run_ahead=False)
    engine.add_request(request(0, [1, 2], 50))
    num_tokens = 2
    while engine.has_unfinished():
        events = engine.step()
        num_tokens += len(events)
        if not events[-1].finish_reason:
            assert engine.stats().kv_pages_used == pages_for(num_tokens, 8)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("quality", [wrong, partly])
def test_drafts_rejected_are_never_found_in_prefix_cache(quality, stages):
    engine, _ = make_engine(drafter=Scripted(quality, num_tokens=15), pipeline_parallel_size=stages)
    first = request("first", [1, 2, 3], 40)
    text = [1, 2, 3, *run_all(engine, [first])["first"]]
    again = [request(length, [*text[:length], 5], 3) for length in (8, 16, 31, 42)]
    events = run_all(engine, again, want_events=True)
    assert_own_texts(events, again)
    assert {event.request_id: event.num_cached_tokens for event in events} == {"8": 8, "16": 16, "31": 24, "42": 40}


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("quality", [right, partly])
@pytest.mark.parametrize("caching", [False, True])
def test_drafts_tight_pool_preempted_leave_texts_alone(caching, quality, stages):
    engine, _ = make_engine(
        drafter=Scripted(quality), num_kv_pages=6, enable_prefix_caching=caching, pipeline_parallel_size=stages
    )
    requests = requests_of(max_tokens=25)[:4]
    assert_own_texts(run_all(engine, requests, want_events=True), requests)
    assert engine.stats().num_preemptions


@pytest.mark.parametrize("max_num_batched_tokens", [16, 32])
def test_drafts_small_budget_leaves_texts_alone(max_num_batched_tokens):
    engine, _ = make_engine(drafter=Scripted(partly, 15), max_num_batched_tokens=max_num_batched_tokens)
    requests = requests_of()
    assert_own_texts(run_all(engine, requests, want_events=True), requests)


def test_drafts_of_samples_of_one_prompt_follow_each_ones_text():
    engine, _ = make_engine(drafter=Scripted(partly))
    requests = [request(i, range(21), 12, top_k=2, seed=i) for i in (1, 2, 3)]
    for entry in requests:
        engine.add_request(entry, prefix_source=None if entry is requests[0] else "1")
    assert_own_texts(finish(engine), requests)


def test_drafts_are_not_made_for_constrained_requests_and_beams():
    engine, _ = make_engine(drafter=Scripted(right))
    constrained = request("a", [1, 2], 12, constraint=TokenSet(range(0, VOCAB_SIZE, 3), VOCAB_SIZE))
    search, params = request("search", [5, 6], 10), BeamSearchParams(beam_width=2)
    engine.add_request(constrained)
    engine.add_beam_search(search, params)
    assert_own_texts(finish(engine), [constrained])
    assert engine.finished_searches()[0].hypotheses == plain_search(search, params)
    assert engine.stats().draft_tokens == 0


@pytest.mark.parametrize("stages", [1, 4])
def test_prompt_lookup_of_a_text_that_repeats_itself_saves_steps(stages, monkeypatch):
    monkeypatch.setattr("fake_wrapper.VOCAB_SIZE", 2)  # whatever it proposes is right every other time
    engine, _ = make_engine(drafter=PromptLookup(3), pipeline_parallel_size=stages)
    entry = request(0, [0, 1, 1], 40)
    assert_own_texts(run_all(engine, [entry], want_events=True), [entry])
    assert engine.stats().accepted_draft_tokens > 10
    assert engine.stats().num_steps == 40 - engine.stats().accepted_draft_tokens


def looked_up(text, most):
    """Behind the latest earlier occurrence of the last three tokens, or else of the last two, over and over."""
    for length in (3, 2):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return (text[end:] * most)[:most]
    return []


@pytest.mark.parametrize("vocab_size", [1, 2, 4, 30])
def test_prompt_lookup_plan_equals_brute_force(vocab_size):
    random, lookup, owner = np.random.default_rng(vocab_size), PromptLookup(5), request("x", [0])
    sequences = [SequenceState(request=owner, order=(i, i), token_ids=[], max_total_len=64) for i in range(2)]
    for step, sequence in itertools.product(range(30), sequences):  # two texts grow in turn
        sequence.token_ids += random.integers(0, vocab_size, 1 + step % 4).tolist()
        most = int(random.integers(0, 8))
        assert list(lookup.plan(sequence, most)) == looked_up(sequence.token_ids, min(most, 5))


def test_drafts_with_room_for_one_chunk_are_made_in_turn():
    """Steps of two prefill rows, one of which is left to prompts: whoever waits the longest goes first."""
    engine, _ = make_engine(drafter=Scripted(right), max_num_batched_tokens=32, run_ahead=False)
    requests = [request(n, [n], 60) for n in range(4)]
    for entry in requests:
        engine.add_request(entry)
    events = [event for _ in range(20) for event in engine.step()]
    counts = [len(tokens) for tokens in tokens_of(events, requests).values()]
    assert max(counts) - min(counts) <= 10  # the first ones began sooner
    finish(engine)


def test_drafts_of_sequences_that_begin_at_different_times_share_steps():
    """Right drafts bring 5 tokens a step to everyone: a run of 41 tokens ends 9 steps after the last arrival."""
    engine, _ = make_engine(drafter=Scripted(right))
    requests = [request(n, [n], 41) for n in range(3)]
    events = []
    for entry in requests:
        engine.add_request(entry)
        events += engine.step()
    assert_own_texts([*events, *finish(engine)], requests)
    assert engine.stats().num_steps == 2 + 9
