"""Small helpers around a DynamicEngine over the fake wrapper."""

from fake_wrapper import FakeWrapper, logprobs, seen, text_of

from jaxinfer.config.attention_span import WHOLE_TEXT
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.beam_search import BeamCandidates, BeamGroup
from jaxinfer.engine.drafting import PROMPT_LOOKUP
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import Request, TokenLogprobs


def request(name, prompt, max_tokens=5, **fields) -> Request:
    return Request(request_id=str(name), prompt_token_ids=tuple(prompt), max_tokens=max_tokens, **fields)


def make_engine(*, max_model_len=64, drafter=None, **fields):
    fields = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 64} | fields
    config = EngineConfig(**fields, draft_model=None if drafter is None else PROMPT_LOOKUP)
    wrapper = FakeWrapper(config, max_model_len=max_model_len)
    if drafter is not None:
        drafter.model_span = wrapper.span
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


def plain_search(entry, params, *, max_model_len=64, span=WHOLE_TEXT):
    """What a beam search finds that asks for one text's log-probabilities after the other."""
    group = BeamGroup(
        beam_width=params.beam_width,
        max_tokens=min(entry.max_tokens, max_model_len - len(entry.prompt_token_ids)),
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        stop_token_ids=entry.stop_token_ids,
    )
    texts = [entry.prompt_token_ids]
    while texts:
        values = [logprobs(seen(text, span)) for text in texts]
        steps = group.advance([BeamCandidates(token_ids=range(len(row)), logprobs=row.tolist()) for row in values])
        texts = [(*texts[step.parent], step.token_id) for step in steps]
    return group.hypotheses(params.num_return_sequences)


def plain_scores(entry, span=WHOLE_TEXT):
    """The log-probabilities of a request's prompt from its second token on; None where it does not ask."""
    prompt, num_top = entry.prompt_token_ids, entry.prompt_logprobs
    if num_top is None:
        return None
    return tuple(
        token_logprobs(logprobs(seen(prompt[:place], span)), token_id, num_top)
        for place, token_id in enumerate(prompt)
        if place
    )


def token_logprobs(values, token_id, num_top):
    """Of a token with these log-probabilities over the vocabulary."""
    top = sorted(range(len(values)), key=lambda token: -values[token])[:num_top]
    return TokenLogprobs(
        logprob=values[token_id],
        rank=1 + sum(values > values[token_id]),
        top_ids=tuple(top),
        top_logprobs=tuple(values[top]),
    )
