"""A draft model that is the model itself: every draft is right, so long as its pages mirror those of the model."""

import pytest
from engine_tools import assert_own_texts, finish, make_engine, request, run_all
from fake_policies import Residues
from fake_wrapper import FakeWrapper

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.draft_model import MAX_UNREAD, DraftModel


def make_drafting_engine(num_tokens=4, **fields):
    """An engine and its draft model's wrapper, which fails on reading what it never wrote."""
    fields = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 64} | fields
    config = EngineConfig(draft_model="itself", num_draft_tokens=num_tokens, **fields)
    draft = FakeWrapper(config, max_model_len=64)
    engine, _ = make_engine(drafter=DraftModel(draft, num_tokens), **fields)
    draft.watch(engine._scheduler.pages)
    return engine, draft


def sampled(name, length, max_tokens=20, **fields):
    return request(name, [name, *range(1, length)], max_tokens, top_k=2, seed=name, **fields)


STAGES = [(1, True), (1, False), (2, True), (4, True)]


@pytest.mark.parametrize(("stages", "run_ahead"), STAGES)
@pytest.mark.parametrize("num_tokens", [1, 4, 15])
def test_draft_model_that_is_the_model_is_always_right(num_tokens, stages, run_ahead):
    engine, _ = make_drafting_engine(num_tokens, pipeline_parallel_size=stages, run_ahead=run_ahead)
    requests = [sampled(n, length) for n, length in enumerate([1, 7, 8, 9, 30])]
    assert_own_texts(run_all(engine, requests, want_events=True), requests)
    stats = engine.stats()
    assert stats.draft_tokens == stats.accepted_draft_tokens > 40


@pytest.mark.parametrize(("stages", "run_ahead"), STAGES)
def test_draft_model_keeps_up_with_shared_pages_and_preemption(stages, run_ahead):
    engine, _ = make_drafting_engine(
        pipeline_parallel_size=stages, run_ahead=run_ahead, num_kv_pages=11, enable_prefix_caching=False
    )
    requests = [sampled(0, 20), *(request(f"0.{n}", [0, *range(1, 20)], 20, top_k=2, seed=n) for n in (1, 2, 3))]
    requests.append(sampled(5, 11, 30))
    for entry in requests:
        engine.add_request(entry, prefix_source="0" if entry.request_id.startswith("0.") else None)
    assert_own_texts(finish(engine), requests)
    stats = engine.stats()
    assert stats.num_preemptions
    assert stats.draft_tokens == stats.accepted_draft_tokens > 0


def test_draft_model_reads_cached_pages_that_it_wrote_before():
    engine, draft = make_drafting_engine()
    first, longer = sampled(1, 24), sampled(1, 33)
    run_all(engine, [first])
    draft.batches.clear()
    assert_own_texts(run_all(engine, [longer], want_events=True), [longer])
    stats = engine.stats()
    assert stats.prefix_cache_hits == 24
    assert stats.draft_tokens == stats.accepted_draft_tokens
    assert draft.batches[0].prefill_start[0] == 24


def test_draft_model_does_nothing_for_constrained_requests_beyond_their_prompts():
    engine, draft = make_drafting_engine()
    entry = request("a", [1, 2], 8, constraint=Residues())
    assert_own_texts(run_all(engine, [entry], want_events=True), [entry])
    assert engine.stats().draft_tokens == 0
    assert len(draft.batches) == 1


def test_draft_model_leaves_few_launches_unread():
    engine, draft = make_drafting_engine(15)
    run_all(engine, [sampled(1, 5, 50)])
    assert 1 < draft.max_pending <= MAX_UNREAD + 2  # the newest, and a prompt's, which nobody reads
