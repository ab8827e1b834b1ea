"""Samples of one prompt: followers begin with their leader's pages, and every one gets its own text."""

import pytest
from engine_tools import assert_own_texts, finish, make_engine, request

PAGE = 8
LENGTHS = [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 2 * PAGE + 5]


def samples(prompt_len, count=3, max_tokens=9, **fields):
    prompt = [3 * i % 11 for i in range(prompt_len)]
    return [request(seed, prompt, max_tokens, top_k=2, seed=seed, **fields) for seed in range(1, count + 1)]


def add(engine, requests, *, share=True):
    """Queues a prompt's samples, the first one as the others' leader."""
    for entry in requests:
        engine.add_request(entry, prefix_source=requests[0].request_id if share and entry is not requests[0] else None)


def pages_copied(wrapper):
    return sum(len(batch.page_copies) for batch in wrapper.batches)


@pytest.mark.parametrize(("stages", "run_ahead"), [(1, True), (1, False), (2, True), (4, True)])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("prompt_len", LENGTHS)
def test_followers_any_prompt_length_copy_partial_page_and_get_own_text(prompt_len, caching, stages, run_ahead):
    engine, wrapper = make_engine(enable_prefix_caching=caching, run_ahead=run_ahead, pipeline_parallel_size=stages)
    requests = samples(prompt_len)
    add(engine, requests)
    assert_own_texts(finish(engine), requests)
    # All but the prompt's last token are there; where they end on a page's border, nothing has to be copied.
    assert pages_copied(wrapper) == (2 if (prompt_len - 1) % PAGE else 0)
    assert sum(int(batch.prefill_len.sum()) for batch in wrapper.batches) == prompt_len + 2


# Alone, each has three pages, but with caching the third, which comes a step later, finds two of them.
@pytest.mark.parametrize(("caching", "alone"), [(False, 3 + 3 + 3), (True, 3 + 3 + 1)])
def test_followers_share_full_pages_of_prompt(caching, alone):
    used = []
    for share in (True, False):
        engine, wrapper = make_engine(enable_prefix_caching=caching)
        requests = samples(2 * PAGE + 5, max_tokens=3)
        add(engine, requests, share=share)
        assert_own_texts(finish(engine), requests)
        used.append(wrapper.max_pages_used)
    assert used == [2 + 1 + 1 + 1, alone]


def test_followers_long_prompt_wait_for_all_chunks_of_it():
    engine, wrapper = make_engine(max_num_batched_tokens=16)
    requests = samples(40)
    add(engine, requests)
    assert_own_texts(finish(engine), requests)
    assert [int(batch.prefill_len.sum()) for batch in wrapper.batches[:5]] == [16, 16, 8, 1, 1]


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_followers_one_slot_run_one_after_the_other(stages):
    engine, _ = make_engine(max_num_seqs=1, pipeline_parallel_size=stages)
    requests = samples(19)
    add(engine, requests)
    assert_own_texts(finish(engine), requests)


@pytest.mark.parametrize("caching", [False, True])
def test_followers_leader_of_one_token_ends_before_they_start(caching):
    engine, wrapper = make_engine(enable_prefix_caching=caching, run_ahead=False)
    requests = [samples(19, max_tokens=1)[0], *samples(19)[1:]]
    add(engine, requests)
    assert_own_texts(finish(engine), requests)
    assert pages_copied(wrapper) == 0


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("num_steps", range(5))
def test_followers_leader_aborted_get_own_text(num_steps, stages):
    engine, _ = make_engine(max_num_batched_tokens=16, pipeline_parallel_size=stages)
    requests = samples(40)
    add(engine, requests)
    early = [event for _ in range(num_steps) for event in engine.step()]
    assert engine.abort("1")
    events = [event for event in [*early, *finish(engine)] if event.request_id != "1"]
    assert_own_texts(events, requests[1:])


def test_followers_aborted_before_they_start_leave_the_others_alone():
    engine, _ = make_engine(max_num_batched_tokens=16)
    requests = samples(40)
    add(engine, requests)
    engine.step()
    assert engine.stats().num_requests_waiting == 2
    assert engine.abort("2")
    assert_own_texts(finish(engine), [requests[0], requests[2]])


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_followers_tight_pool_preempted_get_own_text(stages, caching):
    engine, _ = make_engine(num_kv_pages=6, enable_prefix_caching=caching, pipeline_parallel_size=stages)
    requests = samples(11, count=4, max_tokens=30)
    add(engine, requests)
    assert_own_texts(finish(engine), requests)
    assert engine.stats().num_preemptions


def test_followers_leader_preempted_amid_its_prompt_still_wait_for_it():
    engine, wrapper = make_engine(
        max_model_len=256, num_kv_pages=30, max_num_batched_tokens=16, enable_prefix_caching=False
    )
    older = request("older", [5, 6], 60)
    engine.add_request(older)
    early = [event for _ in range(20) for event in engine.step()]
    requests = samples(202, max_tokens=4)  # the page that is left lasts for ten steps, the prompt for fourteen
    add(engine, requests)
    assert_own_texts([*early, *finish(engine)], [older, *requests], max_model_len=256)
    assert engine.stats().num_preemptions == 1
    assert pages_copied(wrapper) == 2


def test_followers_of_a_leader_that_has_ended_run_alone():
    engine, _ = make_engine()
    requests = samples(19)
    engine.add_request(requests[0])
    early = finish(engine)
    for entry in requests[1:]:
        engine.add_request(entry, prefix_source="1")
    assert_own_texts([*early, *finish(engine)], requests)


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_followers_are_no_queries_of_the_prefix_cache(max_num_seqs):
    """A prompt is looked up once, however many samples it has and whether they run beside their leader or after it."""
    engine, _ = make_engine(max_num_seqs=max_num_seqs)
    requests = samples(2 * PAGE + 5)
    add(engine, requests)
    assert_own_texts(finish(engine), requests)
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (2 * PAGE + 5, 0)
    add(engine, requests)
    assert_own_texts(finish(engine), requests)
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (2 * (2 * PAGE + 5), 2 * PAGE)
