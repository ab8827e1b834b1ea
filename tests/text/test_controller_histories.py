"""Any history of requests, with several tokens a step, gives each its own text or its own error; nothing leaks."""

import pytest
from fake_policies import Panic, Raising, Scripted, partly, right
from fake_wrapper import continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_controller import AsciiTokenizer, constrained, make_controller

from jaxinfer import RequestFailedError
from jaxinfer.sampling_params import SamplingParams

BROKEN = 40
"""A token that the tokenizer of these tests cannot decode."""


@st.composite
def submissions(draw):
    """A prompt, its parameters, and at what method its constraint fails, if it has one."""
    prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=20))
    max_tokens = draw(st.integers(0, 20))
    text = text_of(continuation(prompt, 20))
    places = st.tuples(st.integers(0, 17), st.integers(1, 3))
    stop = [text[first : first + length] for first, length in draw(st.lists(places, max_size=2))]
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)) if draw(st.booleans()) else 0,
        stop=stop,
        include_stop_str_in_output=draw(st.booleans()),
        n=draw(st.sampled_from([1, 1, 3])),
        logprobs=draw(st.sampled_from([None, None, 2])),
    )
    return prompt, params, draw(st.sampled_from([None, None, None, "start", "allowed", "advance"]))


ACTIONS = st.lists(
    st.one_of(
        submissions(),
        st.just("step"),
        st.just("step"),
        st.tuples(st.sampled_from(["abort", "read"]), st.integers(0, 9)),
    ),
    max_size=25,
)


def text_of(token_ids):
    return "".join(chr(32 + token_id) for token_id in token_ids)


def expected_of(prompt, params):
    """Text and tokens of an undisturbed request, found character by character."""
    tokens = continuation(prompt, params.max_tokens)
    text = text_of(tokens)
    for end in range(max(params.min_tokens, 1), len(text) + 1):
        found = [stop for stop in params.stop_strings if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            kept = end if params.include_stop_str_in_output else end - len(longest)
            return text[:kept], tokens[:end]
    return text, tokens


class History:
    """What was asked of a controller, and what came of it."""

    def __init__(self, controller):
        self.controller, self.asked, self.answers, self.deltas, self.aborted = controller, [], [], [], set()

    def do(self, action):
        if action == "step":
            self.controller.step()
        elif action[0] == "abort" and self.answers:
            number = action[1] % len(self.answers)
            if not self.answers[number].is_finished:
                self.aborted.add(number)
            self.controller.abort(self.answers[number])
        elif action[0] == "read" and self.answers:
            self.read(action[1] % len(self.answers))
        elif len(action) == 3:
            self.submit(*action)

    def submit(self, prompt, params, fails_at):
        submission = self.controller.prepare(prompt, params)
        if fails_at is not None:
            submission = constrained(submission, Raising(fails_at, Panic("broken")))
        try:
            answer = self.controller.submit(submission)
        except Panic:
            assert fails_at == "start"
            return
        self.asked.append((prompt, params, fails_at))
        self.answers.append(answer)
        self.deltas.append("")

    def read(self, number):
        """The output, or None if it failed."""
        answer = self.answers[number]
        try:
            output = answer.output()
        except RequestFailedError:
            assert isinstance(answer.error, (Panic, ArithmeticError))
            return None
        self.deltas[number] += output.delta
        return output

    def check(self, number):
        prompt, params, fails_at = self.asked[number]
        text, tokens = expected_of(prompt, params)
        answer, output = self.answers[number], self.read(number)
        assert answer.is_finished
        if output is None:
            names_any_token = params.logprobs is not None  # those of the alternatives
            assert fails_at in ("allowed", "advance") or BROKEN in (*prompt, *tokens) or names_any_token
            return
        assert self.deltas[number] == output.text
        if number in self.aborted:
            assert all(tokens[: len(entry.token_ids)] == list(entry.token_ids) for entry in output.outputs)
            return
        assert fails_at not in ("allowed", "advance") or len(tokens) < 3
        assert [entry.text for entry in output.outputs] == [text] * params.n
        assert [list(entry.token_ids) for entry in output.outputs] == [tokens] * params.n
        if params.logprobs is not None:
            assert [next(iter(found)) for found in output.logprobs] == tokens


@settings(max_examples=40, deadline=None)
@given(ACTIONS, st.sampled_from([None, Scripted(partly), Scripted(right)]), st.sampled_from([1, 2]), st.booleans())
def test_controller_any_history_gives_own_texts_or_errors_and_leaks_no_page(actions, drafter, num_stages, is_broken):
    tokenizer = AsciiTokenizer(BROKEN, ArithmeticError("no text")) if is_broken else AsciiTokenizer()
    controller = make_controller(
        tokenizer=tokenizer, drafter=drafter, num_kv_pages=16, pipeline_parallel_size=num_stages
    )
    history = History(controller)
    for action in actions:
        history.do(action)
    for _ in range(4000):
        if not controller.has_unfinished():
            break
        controller.step()
    for number, answer in enumerate(history.answers):
        history.check(number)
        controller.forget(answer)
    stats = controller._engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_pages_used) == (0, 0, 0)
    assert not controller.has_unfinished() and not controller._places


def test_submit_that_raises_amid_samples_leaves_none_of_them():
    controller = make_controller()
    submission = constrained(
        controller.prepare([5], SamplingParams(n=3, max_tokens=9)), Raising("start", Panic("broken"))
    )
    with pytest.raises(Panic):
        controller.submit(submission)
    assert not controller.has_unfinished() and not controller._places
