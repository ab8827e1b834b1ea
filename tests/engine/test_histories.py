"""Any history of requests of all kinds gives each its own text and scores, and each search its beams; nothing leaks."""

import dataclasses
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from engine_tools import finish, make_engine, plain_scores, plain_search, request
from fake_policies import Residues, Scripted, partly
from fake_wrapper import VOCAB_SIZE, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.drafting import PromptLookup
from jaxinfer.sampling_params import BeamSearchParams
from jaxinfer.wrappers.array_frame import FrameError
from jaxinfer.wrappers.step_frame import pack_step, unpack_step

STOP = frozenset(range(0, 97, 9))


@st.composite
def engines(draw):
    """Settings with which every request fits, alone."""
    budget = draw(st.sampled_from([16, 32, 64]))
    window = draw(st.sampled_from([None, None, 1, 3, 12, 20]))
    return {
        "sliding_window": window,
        "sink_tokens": 0 if window is None else draw(st.sampled_from([0, 2, 9])),
        "page_size": draw(st.sampled_from([8, 16])),
        "max_num_seqs": draw(st.sampled_from([1, 2, 3, 5])),
        "num_kv_pages": draw(st.integers(8, 14)),
        "max_num_batched_tokens": budget,
        "enable_prefix_caching": draw(st.booleans()),
        "enable_chunked_prefill": budget < 64 or draw(st.booleans()),
        "run_ahead": draw(st.booleans()),
        "steps_per_launch": draw(st.sampled_from([None, None, 2, 4])),
        "pipeline_parallel_size": draw(st.sampled_from([1, 1, 2, 3, 4])),
        "drafter": draw(st.sampled_from([None, None, Scripted(partly), PromptLookup(3)])),
    }


@st.composite
def submissions(draw, name):
    """A request, how many samples of it, and a beam search's settings if it is one; many prompts begin alike."""
    kind = draw(st.sampled_from(["plain", "stop", "samples", "constrained", "scored", "search"]))
    family, length = draw(st.integers(0, 1)), draw(st.integers(1, 45))
    prompt = [(family * 31 + i) % 7 for i in range(length)]
    prompt[-1] = draw(st.integers(0, 3))
    entry = request(
        name,
        prompt,
        draw(st.integers(1, 18)),
        stop_token_ids=STOP if kind in ("stop", "search") else frozenset(),
        priority=draw(st.sampled_from([0, 0, 0, -1, 1])),
        constraint=Residues(draw(st.integers(1, 18))) if kind == "constrained" else None,
        prompt_logprobs=draw(st.integers(0, 2)) if kind == "scored" else None,
    )
    search = BeamSearchParams(beam_width=draw(st.integers(1, 3)), early_stopping=True) if kind == "search" else None
    return entry, draw(st.integers(2, 3)) if kind == "samples" else 1, search


@st.composite
def histories(draw):
    """Submissions, steps (None) and aborts (an id)."""
    actions = []
    for number in range(draw(st.integers(1, 7))):
        actions.append(draw(submissions(number)))
        actions += [None] * draw(st.integers(0, 4))
        if draw(st.integers(0, 4)) == 0:
            actions.append(str(draw(st.integers(0, number))))
    return actions


class History:
    """What was asked of an engine, and what came."""

    def __init__(self, engine, span):
        self.engine, self.span = engine, span
        self.requests, self.events, self.searches, self.aborted = {}, {}, {}, set()

    def do(self, action):
        if action is None:
            self.take(self.engine.step())
        elif isinstance(action, str):
            self.aborted |= {action} if self.engine.abort(action) else set()
        else:
            self.submit(*action)

    def submit(self, entry, count, search):
        if search is not None:
            try:
                self.engine.add_beam_search(entry, search)
            except ValueError:  # so many beams do not fit
                return
            self.searches[entry.request_id] = (entry, search)
        for index in range(0 if search else count):
            sample = entry
            if index:
                sample = dataclasses.replace(entry, request_id=f"{entry.request_id}.{index}", top_k=2, seed=index)
            self.requests[sample.request_id], self.events[sample.request_id] = sample, []
            self.engine.add_request(sample, prefix_source=entry.request_id if index else None)

    def take(self, events):
        for event in events:
            assert event.request_id not in self.aborted
            self.events[event.request_id].append(event)

    def check(self):
        for name, entry in self.requests.items():
            events, expected = self.events[name], text_of(entry, 64, self.span)
            if name in self.aborted:
                expected = expected[: len(events)]
            assert [event.token_id for event in events] == expected
            scores = [plain_scores(entry, self.span), *[None] * 64]
            assert [event.prompt_logprobs for event in events] == scores[: len(events)]
            reasons = [event.finish_reason for event in events]
            if name not in self.aborted:
                ended_early = len(events) < min(entry.max_tokens, 64 - len(entry.prompt_token_ids))
                assert reasons.pop() in ("stop", None if ended_early else "length")
            assert not any(reasons)
        found = {search.request_id: search.hypotheses for search in self.engine.finished_searches()}
        assert found == {
            name: plain_search(*search, span=self.span)
            for name, search in self.searches.items()
            if name not in self.aborted
        }


@settings(max_examples=50, deadline=None)
@given(engines(), histories())
def test_engine_any_history_gives_own_results_and_leaks_no_page(engine_settings, actions):
    engine, wrapper = make_engine(max_model_len=64, **engine_settings)
    history = History(engine, wrapper.span)
    for action in actions:
        history.do(action)
    history.take(finish(engine))
    history.check()
    most_launches = engine_settings["pipeline_parallel_size"] + engine_settings["run_ahead"]
    assert wrapper.max_pending <= most_launches * wrapper.rule.length


def wrapper_after(engine_settings, actions):
    """The fake device that a history has run on."""
    engine, wrapper = make_engine(max_model_len=64, **engine_settings)
    history = History(engine, wrapper.span)
    for action in actions:
        history.do(action)
    finish(engine)
    return wrapper


@settings(max_examples=10, deadline=None)
@given(engines(), histories())
def test_step_batches_any_history_have_the_shapes_they_are_signed_with(engine_settings, actions):
    pytest.importorskip("beartype")
    from shape_checker import assert_shapes

    for batch in wrapper_after(engine_settings, actions).batches:
        assert_shapes(batch)


@settings(max_examples=10, deadline=None)
@given(engines(), histories())
def test_step_batches_any_history_come_out_of_their_frames_as_they_were(engine_settings, actions):
    wrapper = wrapper_after(engine_settings, actions)
    for batch in wrapper.batches:
        frame = pack_step(batch)
        again = unpack_step(frame, wrapper.shapes, num_pages=wrapper.num_pages, vocab_size=VOCAB_SIZE)
        assert_same(again, batch)
        with pytest.raises(FrameError):
            unpack_step(frame[:-4], wrapper.shapes, num_pages=wrapper.num_pages, vocab_size=VOCAB_SIZE)


def assert_same(found, expected):
    assert type(found) is type(expected)
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if is_dataclass(other):
            assert_same(one, other)
        else:
            np.testing.assert_array_equal(one, other, strict=isinstance(other, np.ndarray))
