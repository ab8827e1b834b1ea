"""Small helpers around a DynamicEngine over the fake wrapper."""

from fake_wrapper import FakeWrapper

from jaxinfer.config import EngineConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine


def make_engine(*, max_model_len=64, **fields):
    fields = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 64} | fields
    config = EngineConfig(**fields)
    wrapper = FakeWrapper(config, max_model_len=max_model_len)
    return DynamicEngine(wrapper, config, max_model_len=max_model_len), wrapper


def run_all(engine, requests, *, want_events=False):
    """Runs requests to their ends; tokens by request id, or all events."""
    for entry in requests:
        engine.add_request(entry)
    events = []
    while engine.has_unfinished():
        events += engine.step()
    if want_events:
        return events
    outputs = {entry.request_id: [] for entry in requests}
    for event in events:
        outputs[event.request_id].append(event.token_id)
    return outputs
