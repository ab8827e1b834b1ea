"""The engine over a fake device: order, limits, preemption, prefix cache, use of the pipeline."""

import numpy as np
import pytest
from engine_tools import assert_own_texts, finish, make_engine, request, run_all
from fake_wrapper import FakeWrapper, continuation

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import RequestTooLongError


def test_engine_tight_pool_preempts_every_request_and_keeps_output():
    engine, _ = make_engine(num_kv_pages=6, page_size=8, max_num_seqs=4, max_model_len=64, enable_prefix_caching=False)
    requests = [request(i, [i, 2, 3], 40) for i in range(4)]
    outputs = run_all(engine, requests)
    assert engine.stats().num_preemptions >= 3
    for entry in requests:
        assert outputs[entry.request_id] == continuation(entry.prompt_token_ids, 40)


def test_engine_runs_ahead_by_at_most_the_wrappers_limit():
    engine, wrapper = make_engine(pipeline_parallel_size=3)
    run_all(engine, [request(0, [1, 2], 12)])
    assert wrapper.max_pending == 4


def test_engine_first_come_first_served():
    engine, _ = make_engine(max_num_seqs=1)
    order = []
    for number in range(4):
        engine.add_request(request(number, [number + 1], 2))
    while engine.has_unfinished():
        order += [event.request_id for event in engine.step()]
    assert order == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_engine_lower_priority_number_runs_first():
    engine, _ = make_engine(max_num_seqs=1)
    for number, priority in enumerate([5, 1, 3]):
        engine.add_request(request(number, [number + 1], 1, priority=priority))
    order = []
    while engine.has_unfinished():
        order += [event.request_id for event in engine.step()]
    assert order == ["1", "2", "0"]


def test_engine_waiting_request_fills_freed_slot_while_others_run():
    engine, wrapper = make_engine(max_num_seqs=2)
    run_all(engine, [request(0, [1], 12), request(1, [2], 2), request(2, [3], 2)])
    mixed = [batch for batch in wrapper.batches if batch.shape.num_prefill and batch.shape.num_decode]
    assert mixed, "the third request's prompt should have run beside the first's decode"


def test_engine_prefix_hit_reuses_full_pages_but_never_the_last_token():
    engine, _ = make_engine(page_size=8, num_kv_pages=16)
    prompt = list(range(16))
    run_all(engine, [request(0, prompt, 1)])
    events = run_all(engine, [request(1, prompt, 1)], want_events=True)
    assert events[-1].num_cached_tokens == 8
    longer = run_all(engine, [request(2, [*prompt, 5], 1)], want_events=True)
    assert longer[-1].num_cached_tokens == 16


def test_engine_prefix_hit_includes_generated_tokens():
    engine, _ = make_engine(page_size=8, num_kv_pages=16)
    prompt = [1, 2, 3]
    output = run_all(engine, [request(0, prompt, 20)])["0"]
    follow_up = prompt + output + [7]
    events = run_all(engine, [request(1, follow_up, 1)], want_events=True)
    # The last generated token's key was never stored: 22 of 23 tokens have keys, hence two full pages.
    assert events[-1].num_cached_tokens == 16


def test_engine_oldest_waiting_request_is_not_starved():
    engine, _ = make_engine(page_size=8, num_kv_pages=8, max_num_seqs=4, max_model_len=64, enable_prefix_caching=False)
    engine.add_request(request("runs", [1], 24))
    engine.step()
    engine.add_request(request("big", list(range(56)), 4))
    order = []
    for number in range(120):
        engine.add_request(request(f"small{number}", [number % 50], 3))
        order += [event.request_id for event in engine.step() if event.finish_reason]
    assert "big" in order


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "message"),
    [(64, 1, "prompt has 64 tokens, the limit is 63"), (60, 4, "request needs 8 KV pages for 64 tokens")],
)
def test_engine_request_that_can_never_run_is_refused_and_the_rest_goes_on(prompt_len, max_tokens, message):
    engine, _ = make_engine(page_size=8, num_kv_pages=7, max_model_len=64)
    with pytest.raises(ValueError, match=message):
        engine.add_request(request(0, [1] * prompt_len, max_tokens))
    assert run_all(engine, [request(1, [1, 2], 3)])["1"] == continuation([1, 2], 3)


@pytest.mark.parametrize("wrong", [-5, 2**40])
def test_engine_number_that_is_no_token_id_is_refused_and_the_rest_goes_on(wrong):
    engine, _ = make_engine()
    with pytest.raises(ValueError, match=r"token ids must be in 0\.\.2\*\*31 - 1, got "):
        engine.add_request(request(0, [1, wrong]))
    assert run_all(engine, [request(1, [1, 2], 3)])["1"] == continuation([1, 2], 3)


def test_engine_duplicate_id_is_refused():
    engine, _ = make_engine()
    engine.add_request(request(0, [1]))
    with pytest.raises(ValueError, match="already in use"):
        engine.add_request(request(0, [1]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (None, r"the limit is 31 \(the model's context of 32 less one .*\); shorten it or set truncate_prompt_tokens$"),
        (
            32,
            r"\(max_model_len 32 less one .*truncate_prompt_tokens or raise max_model_len, up to the model's context$",
        ),
    ],
)
def test_engine_prompt_too_long_names_the_limit_that_can_be_moved(asked, message):
    config = EngineConfig(max_model_len=asked, max_num_seqs=4, page_size=8, num_kv_pages=8, max_num_batched_tokens=64)
    engine = DynamicEngine(FakeWrapper(config, max_model_len=32), config, max_model_len=32)
    with pytest.raises(RequestTooLongError, match=message):
        engine.check_request(request("a", range(32)))


def test_engine_refuses_what_another_replica_has_too_few_pages_for():
    engine, _ = make_engine(max_model_len=64, page_size=8, num_kv_pages=8)
    engine.check_request(request("a", range(30), 20))
    engine.lower_page_limit(6)
    with pytest.raises(RequestTooLongError, match="needs 7 KV pages for 50 tokens, the pool has 6"):
        engine.check_request(request("a", range(30), 20))
    engine.lower_page_limit(8)
    with pytest.raises(RequestTooLongError, match="the pool has 6"):
        engine.add_request(request("a", range(30), 20))


def test_engine_output_ends_at_max_model_len():
    engine, _ = make_engine(max_model_len=32, page_size=8, num_kv_pages=8)
    events = run_all(engine, [request(0, [1] * 30, 500)], want_events=True)
    assert [event.finish_reason for event in events] == [None, "length"]


def test_engine_without_chunked_prefill_takes_prompts_whole():
    engine, wrapper = make_engine(enable_chunked_prefill=False, max_num_batched_tokens=64, max_model_len=64)
    prompts = [[number] * 40 for number in range(1, 4)]
    outputs = run_all(engine, [request(i, prompt, 3) for i, prompt in enumerate(prompts)])
    assert outputs == {str(i): continuation(prompt, 3) for i, prompt in enumerate(prompts)}
    assert {tuple(sorted(batch.prefill_len.tolist())) for batch in wrapper.batches} == {(), (0, 8, 16, 16)}


def test_engine_without_chunked_prefill_needs_the_budget_for_it():
    with pytest.raises(ValueError, match="max_num_batched_tokens must be >= max_model_len"):
        make_engine(enable_chunked_prefill=False, max_num_batched_tokens=32, max_model_len=64)


def test_engine_abort_while_a_step_is_in_flight_drops_its_token():
    engine, _ = make_engine()
    engine.add_request(request(0, [1, 2], 50))
    engine.add_request(request(1, [3], 4))
    for _ in range(3):
        engine.step()
    assert engine.abort("0")
    assert not engine.abort("0")
    rest = []
    while engine.has_unfinished():
        rest += engine.step()
    assert {event.request_id for event in rest} == {"1"}
    assert engine.stats().kv_pages_used == 0


def test_engine_four_stages_keep_nearly_all_launched_rows_useful():
    """64 requests of mixed lengths; one batch at a time would leave three of four stages idle, hence at most 0.25.

    A stage has 4 decode rows at most; steps with 2 or 3 are padded to 4, which no idle stage explains.
    """
    engine, _ = make_engine(
        max_model_len=128,
        max_num_seqs=16,
        num_kv_pages=400,
        max_num_batched_tokens=64,
        pipeline_parallel_size=4,
        enable_prefix_caching=False,
    )
    random = np.random.default_rng(3)
    lengths = zip(random.integers(8, 61, 64), random.integers(16, 49, 64), strict=True)
    run_all(engine, [request(name, [name] * prompt, int(output)) for name, (prompt, output) in enumerate(lengths)])
    stats = engine.stats()
    assert stats.num_rows_live / stats.num_rows_launched >= 0.82


def test_engine_chunks_of_one_prompt_enter_on_consecutive_ticks():
    """Five chunks and four stages: the first token leaves with the eighth launch, not with the twentieth."""
    engine, wrapper = make_engine(
        max_model_len=128, max_num_batched_tokens=16, pipeline_parallel_size=4, run_ahead=False
    )
    engine.add_request(request("long", range(80), max_tokens=1))
    while engine.has_unfinished():
        engine.step()
    assert [int(batch.prefill_len.sum()) for batch in wrapper.batches[:8]] == [16] * 5 + [0] * 3
    assert len(wrapper.batches) == 8


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_engine_preempted_request_waits_for_its_unread_tokens_even_where_there_is_room(stages):
    engine, _ = make_engine(num_kv_pages=6, enable_prefix_caching=False, pipeline_parallel_size=stages)
    requests = [request(i, [i, 2, 3], 40) for i in range(3)]
    for entry in requests:
        engine.add_request(entry)
    early = []
    while not engine.stats().num_preemptions:
        early += engine.step()
    engine.abort("0")
    assert_own_texts([event for event in [*early, *finish(engine)] if event.request_id != "0"], requests[1:])
