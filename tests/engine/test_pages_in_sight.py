"""Pages that nobody sees any more: texts far longer than the pool, cached beginnings with holes, what is refused."""

import pytest
from engine_tools import assert_own_texts, finish, make_engine, request, run_all, tokens_of
from fake_policies import Scripted, partly
from fake_wrapper import text_of
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.config.attention_span import AttentionSpan, widest
from jaxinfer.engine.pages_in_sight import PagesInSight
from jaxinfer.request import RequestTooLongError

WINDOW = {"sliding_window": 12, "sink_tokens": 3, "page_size": 8, "max_num_batched_tokens": 16}


def long_requests(count):
    return [request(number, [(number + 1) * place % 89 for place in range(150)], 120) for number in range(count)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"steps_per_launch": 4},
        {"pipeline_parallel_size": 3},
        {"drafter": Scripted(partly)},
    ],
    ids=["plain", "uncached", "chains", "stages", "drafts"],
)
@pytest.mark.parametrize("num_kv_pages", [6, 15])
def test_texts_far_longer_than_the_pool_get_their_tokens(num_kv_pages, settings):
    engine, wrapper = make_engine(max_model_len=512, num_kv_pages=num_kv_pages, **WINDOW, **settings)
    requests = long_requests(3)
    found = run_all(engine, requests)
    assert found == {entry.request_id: text_of(entry, 512, wrapper.span) for entry in requests}
    assert wrapper.max_pages_used <= num_kv_pages < 270 // 8
    assert engine.longest_request == 512


def test_one_text_holds_the_pages_of_its_window_and_its_sinks():
    engine, _ = make_engine(max_model_len=512, **WINDOW)
    engine.add_request(request("a", range(10), 400))
    used = []
    while engine.has_unfinished():
        engine.step()
        used.append(engine.stats().kv_pages_used)
    assert max(used[40:-1]) <= 1 + 3  # 12 tokens begin in the middle of a page


def test_request_that_no_pool_of_this_size_can_hold_is_refused():
    engine, _ = make_engine(max_model_len=512, num_kv_pages=5, **WINDOW)
    with pytest.raises(
        RequestTooLongError, match="needs 6 KV pages for 270 tokens, the pool has 5; lower max_tokens or max_num_b"
    ):
        engine.check_request(long_requests(1)[0])
    engine.check_request(request("short", range(20), 20))
    assert engine.longest_request == 40


@pytest.mark.parametrize("num_kv_pages", [64, 9])
def test_next_turn_goes_on_where_the_pages_in_sight_are_cached(num_kv_pages):
    engine, wrapper = make_engine(max_model_len=512, num_kv_pages=num_kv_pages, **WINDOW)
    first = request("first", range(80), 41)
    text = [*range(80), *run_all(engine, [first])["first"]]
    second = request("second", [*text, 5, 6, 7], 20)
    assert run_all(engine, [second])["second"] == text_of(second, 512, wrapper.span)
    assert engine.stats().prefix_cache_hits == 120  # all full pages, although 9 cannot hold them all


@pytest.mark.parametrize("length", range(64, 72))
def test_samples_share_the_prompt_as_far_as_they_see_it(length):
    settings = WINDOW | {"enable_prefix_caching": False, "max_num_batched_tokens": 64}
    engine, wrapper = make_engine(max_model_len=512, **settings)
    requests = [request(number, range(length), 30, top_k=2, seed=number) for number in range(4)]
    for number, entry in enumerate(requests):
        engine.add_request(entry, prefix_source="0" if number else None)
    found = tokens_of(finish(engine), requests)
    assert found == {entry.request_id: text_of(entry, 512, wrapper.span) for entry in requests}
    assert sum(int(batch.prefill_len.sum()) for batch in wrapper.batches) == length + 3  # their last tokens


def test_samples_that_come_too_late_to_share_are_computed():
    engine, wrapper = make_engine(max_model_len=512, max_num_seqs=2, **WINDOW)
    requests = [request(number, range(70), 30, top_k=2, seed=number) for number in range(5)]
    for number, entry in enumerate(requests):
        engine.add_request(entry, prefix_source="0" if number else None)
    found = tokens_of(finish(engine), requests)
    assert found == {entry.request_id: text_of(entry, 512, wrapper.span) for entry in requests}


@pytest.mark.parametrize("num_kv_pages", [8, 9, 13, 16, 20])
@pytest.mark.parametrize("sink_tokens", [0, 4, 40])
def test_prompts_are_admitted_only_if_all_pages_that_they_will_hold_are_left(sink_tokens, num_kv_pages):
    settings = WINDOW | {"sink_tokens": sink_tokens, "num_kv_pages": max(num_kv_pages, 5 + sink_tokens // 8)}
    engine, wrapper = make_engine(max_model_len=2048, **settings)
    requests = [request(number, [number] * 150, 100) for number in range(6)]
    run_all(engine, requests)
    assert engine.stats().num_preemptions == 0
    assert sum(int(batch.prefill_len.sum()) for batch in wrapper.batches) == 6 * 150


def test_window_longer_than_every_text_changes_nothing():
    engine, _ = make_engine(sliding_window=64, max_num_batched_tokens=16)
    requests = [request(number, range(number, 40), 20) for number in range(4)]
    assert_own_texts(run_all(engine, requests, want_events=True), requests)


@given(
    st.lists(st.booleans(), max_size=12),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(0, 20),
)
def test_usable_pages_are_the_longest_beginning_of_which_all_in_sight_is_there(there, window, sinks):
    span = AttentionSpan(window, sinks if window else 0)
    in_sight = PagesInSight(span, page_size=8, max_chunk=16)

    def sees(position, page):
        near = window is None or any(position - token < window for token in range(page * 8, page * 8 + 8))
        return near or page * 8 < span.sink_tokens

    expected = [end for end in range(len(there) + 1) if all(there[page] for page in range(end) if sees(end * 8, page))]
    assert in_sight.num_usable([int(page) for page in there]) == expected[-1]


def test_widest_span_covers_every_layer():
    limit = AttentionSpan(100, sink_tokens=4)
    assert limit.within(None) == limit and limit.within(200) == limit
    assert limit.within(50) == AttentionSpan(50)
    assert limit.within(100) == limit
    assert AttentionSpan().within(50) == AttentionSpan(50)
    assert widest([AttentionSpan(50), limit]) == limit
    assert widest([AttentionSpan(50), AttentionSpan()]) == AttentionSpan()


def test_pages_given_back_before_their_tokens_are_read_are_not_cached_and_those_between_are():
    settings = {"steps_per_launch": 3, "run_ahead": False, "sliding_window": 2, "max_num_batched_tokens": 16}
    engine, wrapper = make_engine(max_model_len=512, num_kv_pages=40, **settings)
    first = [request(number, range(number, 20), 100) for number in range(3)]
    found = run_all(engine, first)
    texts = [[*entry.prompt_token_ids, *found[entry.request_id]] for entry in first]
    again = [request(f"{number}.{end}", text[:end], 4) for number, text in enumerate(texts) for end in range(25, 115)]
    run_all(engine, again[75:76])  # the first 100 tokens of a text
    assert engine.stats().prefix_cache_hits == 96
    assert run_all(engine, again[90:]) == {entry.request_id: text_of(entry, 512, wrapper.span) for entry in again[90:]}
