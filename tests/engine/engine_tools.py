"""Small helpers around a DynamicEngine over the fake wrapper."""

from fake_wrapper import FakeWrapper, text_of

from jaxinfer.config import EngineConfig
from jaxinfer.engine.drafting import PROMPT_LOOKUP
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import Request


def request(name, prompt, max_tokens=5, **fields) -> Request:
    return Request(request_id=str(name), prompt_token_ids=tuple(prompt), max_tokens=max_tokens, **fields)


def make_engine(*, max_model_len=64, drafter=None, **fields):
    fields = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 64} | fields
    config = EngineConfig(**fields, draft_model=None if drafter is None else PROMPT_LOOKUP)
    wrapper = FakeWrapper(config, max_model_len=max_model_len)
    engine = DynamicEngine(wrapper, config, max_model_len=max_model_len, drafter=drafter)
    wrapper.watch(engine._scheduler.pages)
    return engine, wrapper


def run_all(engine, requests, *, want_events=False):
    """Runs requests to their ends; tokens by request id, or all events."""
    for entry in requests:
        engine.add_request(entry)
    events = finish(engine)
    return events if want_events else tokens_of(events, requests)


def finish(engine):
    """Steps until nothing is unfinished; the events, once no page is left in use."""
    events = []
    for _ in range(4000):
        if not engine.has_unfinished():
            break
        events += engine.step()
    assert not engine.has_unfinished()
    stats = engine.stats()
    assert (stats.kv_pages_used, stats.num_requests_running, stats.num_requests_waiting) == (0, 0, 0)
    return events


def tokens_of(events, requests):
    """Tokens by request id."""
    outputs = {entry.request_id: [] for entry in requests}
    for event in events:
        outputs[event.request_id].append(event.token_id)
    return outputs


def assert_own_texts(events, requests, *, max_model_len=64):
    """Every request got what it would have got alone."""
    assert tokens_of(events, requests) == {entry.request_id: text_of(entry, max_model_len) for entry in requests}
