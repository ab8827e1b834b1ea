"""Scored prompts: every token from the second on once and in order, however the prompt was cut, moved or restarted."""

import pytest
from engine_tools import assert_own_texts, finish, make_engine, plain_scores, request, run_all
from fake_policies import Scripted, partly

from jaxinfer.wrappers.step_batch import NO_TARGET


def scored(name, prompt_len, num_top=2, **fields):
    return request(name, [(name + 3 * i) % 11 for i in range(prompt_len)], prompt_logprobs=num_top, **fields)


def assert_scored(events, requests, **limits):
    """Own texts, and with the first token of each the scores of its prompt."""
    assert_own_texts(events, requests, **limits)
    for entry in requests:
        found = [event.prompt_logprobs for event in events if event.request_id == entry.request_id]
        assert found == [plain_scores(entry)] + [None] * (len(found) - 1)


def num_scored(wrapper):
    return sum(int((batch.targets != NO_TARGET).sum()) for batch in wrapper.batches if batch.targets is not None)


@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize(("stages", "run_ahead"), [(1, True), (1, False), (2, True), (4, True)])
@pytest.mark.parametrize("drafter", [None, Scripted(partly)])
def test_scores_any_prompt_length_cover_each_position_once(drafter, stages, run_ahead, budget):
    engine, wrapper = make_engine(
        drafter=drafter, pipeline_parallel_size=stages, run_ahead=run_ahead, max_num_batched_tokens=budget
    )
    lengths = [1, 2, 7, 8, 9, 16, 17, 18, 40]
    requests = [scored(name, length, num_top=name % 3) for name, length in enumerate(lengths)]
    requests.insert(3, request("plain", [5] * 21))
    assert_scored(run_all(engine, requests, want_events=True), requests)
    assert num_scored(wrapper) == sum(length - 1 for length in lengths)


@pytest.mark.parametrize("caching", [False, True])
def test_scores_preempted_amid_prompt_go_on_where_they_stopped(caching):
    engine, wrapper = make_engine(
        max_model_len=256, num_kv_pages=30, max_num_batched_tokens=16, enable_prefix_caching=caching
    )
    older, entry = request("older", [5, 6], 60), scored(1, 202)
    engine.add_request(older)
    early = [event for _ in range(20) for event in engine.step()]
    engine.add_request(entry)  # the page that is left lasts for ten steps, the prompt for fourteen
    assert_scored([*early, *finish(engine)], [older, entry], max_model_len=256)
    assert engine.stats().num_preemptions == 1
    assert num_scored(wrapper) == 201


@pytest.mark.parametrize("stages", [1, 2])
def test_scores_do_not_read_prefix_cache_but_fill_it(stages):
    engine, wrapper = make_engine(pipeline_parallel_size=stages)
    plain, entry = request("plain", scored(1, 40).prompt_token_ids), scored(1, 40)
    run_all(engine, [plain])
    events = run_all(engine, [entry], want_events=True)
    assert_scored(events, [entry])
    assert events[0].num_cached_tokens == 0
    assert num_scored(wrapper) == 39
    assert run_all(engine, [plain], want_events=True)[0].num_cached_tokens == 32


def test_scores_preempted_behind_prompt_then_read_prefix_cache():
    num_prefilled = []
    for caching in (False, True):
        engine, wrapper = make_engine(num_kv_pages=8, max_num_seqs=2, enable_prefix_caching=caching)
        requests = [request("older", [5, 6], 45), scored(1, 11, max_tokens=30)]
        assert_scored(run_all(engine, requests, want_events=True), requests)
        assert engine.stats().num_preemptions == 1
        assert num_scored(wrapper) == 10
        num_prefilled.append(sum(int(batch.prefill_len.sum()) for batch in wrapper.batches))
    assert num_prefilled[1] < num_prefilled[0]


def test_scores_of_leader_do_not_keep_followers_from_its_pages():
    engine, wrapper = make_engine(max_num_batched_tokens=16)
    requests = [scored(1, 40), *(request(i, scored(1, 40).prompt_token_ids, top_k=2, seed=i) for i in (2, 3))]
    for entry in requests:
        engine.add_request(entry, prefix_source=None if entry is requests[0] else "1")
    assert_scored(finish(engine), requests)
    assert num_scored(wrapper) == 39
    assert sum(int(batch.prefill_len.sum()) for batch in wrapper.batches) == 42


@pytest.mark.parametrize("num_steps", range(4))
def test_scores_aborted_amid_prompt_leave_others_alone(num_steps):
    engine, _ = make_engine(max_num_batched_tokens=16, pipeline_parallel_size=2)
    requests = [scored(1, 40), scored(2, 30)]
    for entry in requests:
        engine.add_request(entry)
    early = [event for _ in range(num_steps) for event in engine.step()]
    engine.abort("1")
    assert_scored([*early, *finish(engine)], requests[1:])


def test_scores_of_a_follower_do_not_come_from_its_leaders_pages():
    engine, _ = make_engine()
    leader, follower = request("leader", scored(1, 20).prompt_token_ids), scored(1, 20)
    engine.add_request(leader)
    engine.add_request(follower, prefix_source="leader")
    assert_scored(finish(engine), [leader, follower])
