"""Several decode steps in one launch: when the engine makes such chains, and that texts stay what they were."""

import pytest
from engine_tools import finish, make_engine, request, run_all
from fake_policies import Residues
from fake_wrapper import continuation

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.wrappers.chains import CHAIN_LEN, MAX_ROWS, MAX_WEIGHT_BYTES, ChainRule


def test_chain_gives_the_text_of_single_steps():
    engine, wrapper = make_engine(steps_per_launch=4)
    requests = [request(number, [number, 5], 6 * number + 3) for number in range(1, 4)]
    outputs = run_all(engine, requests)
    for entry in requests:
        assert outputs[entry.request_id] == continuation(entry.prompt_token_ids, entry.max_tokens)
    assert wrapper.chains and set(wrapper.chains) == {4}
    assert engine.stats().num_steps == len(wrapper.batches)


def test_chain_events_of_a_launch_come_together_in_order():
    engine, _ = make_engine(steps_per_launch=4, run_ahead=False)
    engine.add_request(request(0, [3], 9))
    numbers, tokens = [], []
    while engine.has_unfinished():
        events = engine.step()
        numbers.append(len(events))
        tokens += [event.token_id for event in events]
    assert tokens == continuation([3], 9)
    assert numbers == [1, 4, 4]  # the prompt's step, then two chains


def test_chain_is_not_begun_when_less_than_a_chain_is_left():
    engine, wrapper = make_engine(steps_per_launch=4, run_ahead=False)
    run_all(engine, [request(0, [3], 4)])  # one token with the prompt, three more
    assert wrapper.chains == []


def test_chain_waits_while_a_request_waits():
    engine, wrapper = make_engine(steps_per_launch=4, max_num_seqs=1)
    engine.add_request(request(0, [1], 30))
    engine.add_request(request(1, [2], 1))
    for _ in range(20):
        engine.step()
    assert wrapper.chains == []
    finish(engine)
    assert wrapper.chains == []


def test_chain_waits_while_a_prompt_is_computed():
    engine, wrapper = make_engine(
        steps_per_launch=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=256, num_kv_pages=64
    )
    engine.add_request(request(0, [1], 60))
    engine.step()
    engine.add_request(request(1, [2] * 150, 1))
    for _ in range(8):  # ten chunks
        engine.step()
        assert wrapper.chains == []
    finish(engine)
    assert wrapper.chains


def test_chain_needs_requests_whose_next_token_no_constraint_decides():
    engine, wrapper = make_engine(steps_per_launch=4)
    run_all(engine, [request(0, [1], 12, constraint=Residues(6)), request(1, [2], 12)])
    assert set(wrapper.chains) <= {4}
    constrained = [batch for batch in wrapper.batches if batch.edited]
    assert constrained  # those ran as single steps, or launch_chain would have refused them


def test_chain_takes_no_page_from_anybody():
    settings = {"steps_per_launch": 4, "num_kv_pages": 6, "page_size": 8, "max_num_seqs": 4, "max_model_len": 64}
    engine, wrapper = make_engine(enable_prefix_caching=False, **settings)
    requests = [request(number, [number, 2, 3], 40) for number in range(4)]
    outputs = run_all(engine, requests)
    assert engine.stats().num_preemptions >= 3 and wrapper.chains
    for entry in requests:
        assert outputs[entry.request_id] == continuation(entry.prompt_token_ids, 40)


def test_chain_drops_the_tokens_behind_an_end_and_an_abort():
    engine, _ = make_engine(steps_per_launch=4)
    text = continuation([7], 30)
    engine.add_request(request(0, [7], 30, stop_token_ids=frozenset({text[6]})))
    engine.add_request(request(1, [9], 30))
    events = []
    while len([event for event in events if event.request_id == "1"]) < 9:
        events += engine.step()
    engine.abort("1")
    events += finish(engine)
    assert [event.token_id for event in events if event.request_id == "0"] == text[: text.index(text[6]) + 1]
    assert engine.stats().kv_pages_used == 0


@pytest.mark.parametrize(
    ("settings", "platform", "gigabytes", "expected"),
    [
        ({}, "gpu", 1.2, {1: CHAIN_LEN, MAX_ROWS: CHAIN_LEN, MAX_ROWS + 1: 1}),
        ({}, "gpu", MAX_WEIGHT_BYTES / 1e9 + 1, {1: 1}),
        ({}, "cpu", 0.1, {1: 1}),
        ({"steps_per_launch": 3}, "cpu", 16, {1: 3, 64: 3}),
        ({"steps_per_launch": 1}, "gpu", 0.1, {1: 1}),
        ({"steps_per_launch": 4, "pipeline_parallel_size": 2}, "gpu", 0.1, {1: 1}),
        ({"draft_model": "prompt-lookup"}, "gpu", 0.1, {1: 1}),
    ],
)
def test_chain_rule_follows_settings_platform_weights_and_rows(settings, platform, gigabytes, expected):
    config = EngineConfig(max_num_seqs=64, **settings)
    rule = ChainRule.of(config, platform=platform, weight_bytes=round(gigabytes * 1e9))
    assert {rows: rule.length if rule.covers(rows) else 1 for rows in expected} == expected
