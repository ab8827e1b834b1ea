"""Beam search through the engine finds what it finds over the plain log-probabilities, whatever runs beside it."""

import pytest
from engine_tools import assert_own_texts, finish, make_engine, plain_search, request

from jaxinfer.sampling_params import BeamSearchParams

STOP = frozenset(range(0, 97, 9))


def params(**fields):
    return BeamSearchParams(**{"beam_width": 3, "num_return_sequences": 3} | fields)


def search_of(name, prompt_len=11, max_tokens=12, **fields):
    return request(f"search{name}", [(name + 3 * i) % 11 for i in range(prompt_len)], max_tokens, **fields)


def assert_found(engine, searches, settings):
    found = {search.request_id: search.hypotheses for search in engine.finished_searches()}
    assert found == {entry.request_id: plain_search(entry, settings) for entry in searches}


@pytest.mark.parametrize(("stages", "run_ahead"), [(1, True), (1, False), (2, True), (4, True)])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("prompt_len", [1, 7, 8, 9, 17])
def test_beam_search_any_prompt_length_equals_plain_loop(prompt_len, caching, stages, run_ahead):
    engine, _ = make_engine(enable_prefix_caching=caching, pipeline_parallel_size=stages, run_ahead=run_ahead)
    entry = search_of(1, prompt_len)
    engine.add_beam_search(entry, params())
    assert finish(engine) == []
    assert_found(engine, [entry], params())


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("beam_width", [1, 2, 4])
def test_beam_search_with_end_tokens_equals_plain_loop(beam_width, early_stopping):
    settings = params(beam_width=beam_width, num_return_sequences=beam_width, early_stopping=early_stopping)
    engine, _ = make_engine(max_num_seqs=2 * beam_width)
    searches = [search_of(i, max_tokens=20, stop_token_ids=STOP) for i in range(8)]
    for entry in searches:
        engine.add_beam_search(entry, settings)
    finish(engine)
    assert_found(engine, searches, settings)


def test_beam_search_ends_at_max_model_len():
    engine, _ = make_engine(max_model_len=32)
    entry = search_of(1, prompt_len=27, max_tokens=100)
    engine.add_beam_search(entry, params())
    finish(engine)
    (search,) = engine.finished_searches()
    assert search.hypotheses == plain_search(entry, params(), max_model_len=32)
    assert {len(found.token_ids) for found in search.hypotheses} == {5}


def test_beam_search_beams_share_full_pages():
    engine, wrapper = make_engine(enable_prefix_caching=False)
    engine.add_beam_search(search_of(1, prompt_len=33, max_tokens=6), params())
    finish(engine)
    assert wrapper.max_pages_used <= 4 + 3 * 1


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_beam_search_beside_requests_leaves_all_their_own(stages):
    engine, _ = make_engine(max_num_seqs=6, pipeline_parallel_size=stages)
    requests = [request(i, [i, 5], 25, top_k=2, seed=i) for i in range(3)]
    searches = [search_of(1), search_of(2, prompt_len=20)]
    for entry in requests[:2]:
        engine.add_request(entry)
    for entry in searches:
        engine.add_beam_search(entry, params())
    engine.add_request(requests[2])
    assert_own_texts(finish(engine), requests)
    assert_found(engine, searches, params())


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("num_kv_pages", [9, 11])
def test_beam_search_tight_pool_preempts_and_equals_plain_loop(num_kv_pages, stages):
    engine, _ = make_engine(
        max_num_seqs=5, num_kv_pages=num_kv_pages, enable_prefix_caching=False, pipeline_parallel_size=stages
    )
    requests, entry = [request(i, [i, 2], 45) for i in range(2)], search_of(1)
    engine.add_request(requests[0])
    engine.add_beam_search(entry, params())
    engine.add_request(requests[1])
    assert_own_texts(finish(engine), requests)
    assert_found(engine, [entry], params())
    assert engine.stats().num_preemptions


@pytest.mark.parametrize("caching", [False, True])
def test_beam_search_pool_of_exactly_its_pages_is_enough(caching):
    engine, _ = make_engine(num_kv_pages=3, max_num_seqs=3, enable_prefix_caching=caching)
    entry = search_of(1, prompt_len=2, max_tokens=6)  # one page a beam
    engine.add_beam_search(entry, params())
    finish(engine)
    assert_found(engine, [entry], params())


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(("max_num_seqs", "num_kv_pages"), [(3, 64), (4, 64), (6, 9)])
def test_beam_searches_that_hold_what_the_other_needs_both_end(max_num_seqs, num_kv_pages, stages):
    engine, _ = make_engine(
        max_num_seqs=max_num_seqs,
        num_kv_pages=num_kv_pages,
        enable_prefix_caching=False,
        pipeline_parallel_size=stages,
    )
    searches = [search_of(i) for i in range(3)]
    for entry in searches:
        engine.add_beam_search(entry, params())
    finish(engine)
    assert_found(engine, searches, params())
    assert engine.stats().num_preemptions


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("num_steps", range(0, 12, 2))
def test_beam_search_aborted_at_any_step_leaves_nothing(num_steps, stages):
    engine, _ = make_engine(max_num_seqs=3, pipeline_parallel_size=stages, enable_prefix_caching=False)
    entry, other = search_of(1), request("other", [7], 8)
    engine.add_beam_search(entry, params())
    engine.add_request(other)
    early = [event for _ in range(num_steps) for event in engine.step()]
    assert engine.abort(entry.request_id)
    assert_own_texts([*early, *finish(engine)], [other])
    assert engine.finished_searches() == []
    engine.add_beam_search(entry, params())  # its id is free again
    finish(engine)
    assert_found(engine, [entry], params())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 2}, "beam_width must be <= max_num_seqs, .* got 3 > 2"),
        ({"num_kv_pages": 8}, "needs 9 KV pages for 3 x 23 tokens, the pool has 8"),
        ({"max_model_len": 8}, "prompt has 11 tokens, the limit is 7"),
    ],
)
def test_beam_search_that_could_never_run_is_refused(settings, message):
    engine, _ = make_engine(**settings)
    for refuse in (lambda: engine.check_request(search_of(1), beam_width=3), lambda: add(engine)):
        with pytest.raises(ValueError, match=message):
            refuse()
    assert not engine.has_unfinished()


def add(engine):
    engine.add_beam_search(search_of(1), params())


def test_beam_search_id_in_use_is_refused():
    engine, _ = make_engine()
    add(engine)
    with pytest.raises(ValueError, match="'search1' is already in use"):
        add(engine)
    with pytest.raises(ValueError, match="'search1' is already in use"):
        engine.add_request(search_of(1))
