"""Constraints in the engine: every token is sampled under the mask that all tokens before it leave, and nobody else
waits for that."""

import numpy as np
import pytest
from engine_tools import assert_own_texts, finish, make_engine, request, run_all, tokens_of
from fake_policies import Panic, Raising, Residues, ResidueState
from fake_wrapper import continuation, text_of

from jaxinfer.constraints.constraint import ConstraintError


class DeadEnd(Residues):
    """Allows nothing after so many tokens, without being complete."""

    def start(self):
        return DeadEndState(self.length)


class DeadEndState(ResidueState):
    is_complete = False

    def allowed(self):
        return super().allowed() * np.uint32(self._left > 0)


class Failing(Residues):
    """Cannot say what follows after so many tokens."""

    def start(self):
        return FailingState(self.length)


class FailingState(ResidueState):
    is_complete = False

    def allowed(self):
        if self._left == 0:
            raise ConstraintError("lost")
        return super().allowed()


class Counting:
    """Counts the states that were started and the masks that these computed."""

    num_states = num_masks = 0

    def start(self):
        self.num_states += 1
        return CountingState(self)


class CountingState(ResidueState):
    """Computes a mask once, as a constraint's state is to."""

    def __init__(self, constraint):
        super().__init__(1000)
        self._constraint, self._mask = constraint, None

    def allowed(self):
        if self._mask is None:
            self._constraint.num_masks += 1
            self._mask = super().allowed()
        return self._mask

    def advance(self, token_id):
        self._mask = None
        super().advance(token_id)


def launches(wrapper, slot):
    """The steps that sample a token of a slot."""
    return [number for number, batch in enumerate(wrapper.batches) if slot in batch.logit_slots]


def run_beside_others(constraint, **settings):
    """A wrapper that ran a request, in slot 0, beside two plain ones."""
    engine, wrapper = make_engine(**settings)
    requests = [request("a", [1, 2], 8, constraint=constraint), request("b", [3], 16), request("c", [4], 16)]
    assert_own_texts(run_all(engine, requests, want_events=True), requests)
    return wrapper


def test_constrained_one_stage_is_left_out_until_its_last_token_is_read():
    constrained, plain = run_beside_others(Residues()), run_beside_others(None)
    assert launches(plain, 0) == list(range(8))
    assert launches(constrained, 0) == list(range(0, 16, 2))
    assert launches(constrained, 1) == launches(constrained, 2) == launches(plain, 1) == list(range(16))


def test_constrained_without_run_ahead_is_in_every_step():
    assert launches(run_beside_others(Residues(), run_ahead=False), 0) == list(range(8))


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("stages", [2, 4])
def test_constrained_in_pipeline_waits_for_nothing(stages, run_ahead):
    settings = {"pipeline_parallel_size": stages, "run_ahead": run_ahead}
    constrained, plain = run_beside_others(Residues(), **settings), run_beside_others(None, **settings)
    assert launches(constrained, 0) == list(range(0, 8 * stages, stages))
    for slot in range(3):
        assert launches(constrained, slot) == launches(plain, slot)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_constrained_mask_arrives_with_the_launch_that_samples(stages):
    wrapper = run_beside_others(Residues(), pipeline_parallel_size=stages)
    sampled = [number + stages - 1 for number in launches(wrapper, 0)]
    assert [number for number, mask in enumerate(wrapper.masks) if len(mask.slots)] == sampled
    state = Residues().start()
    for number, token_id in zip(sampled, text_of(request("a", [1, 2], 8, constraint=Residues()), 64), strict=True):
        assert wrapper.masks[number].slots.tolist() == [0]
        np.testing.assert_array_equal(wrapper.masks[number].words[0], state.allowed())
        state.advance(token_id)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_constrained_ends_with_stop_where_it_is_complete(stages):
    engine, _ = make_engine(pipeline_parallel_size=stages)
    events = run_all(engine, [request("a", [1, 2], 8, constraint=Residues(3))], want_events=True)
    assert [event.finish_reason for event in events] == [None, None, "stop"]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("constraint", [Failing(3), DeadEnd(3)], ids=["error", "dead end"])
def test_constrained_error_aborts_that_request_alone(constraint, stages):
    engine, _ = make_engine(pipeline_parallel_size=stages)
    requests = [request("a", [1, 2], 8, constraint=constraint), request("b", [3], 12)]
    events = run_all(engine, requests, want_events=True)
    assert [event.finish_reason for event in events if event.request_id == "a"] == [None, None, "abort"]
    assert tokens_of(events, requests)["b"] == continuation([3], 12)
    assert run_all(engine, [request("c", [1], 3)])["c"] == continuation([1], 3)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("error", [ArithmeticError("odd"), Panic("odd")], ids=["error", "panic"])
@pytest.mark.parametrize("method", ["allowed", "advance"])
def test_constrained_that_raises_what_no_constraint_should_fails_alone(method, error, stages):
    engine, _ = make_engine(pipeline_parallel_size=stages)
    requests = [request("a", [1, 2], 8, constraint=Raising(method, error)), request("b", [3], 12)]
    events = run_all(engine, requests, want_events=True)
    (failed,) = engine.failed_requests()
    assert (failed.request_id, failed.error) == ("a", error)
    assert not any(event.finish_reason for event in events if event.request_id == "a")
    assert tokens_of(events, requests)["b"] == continuation([3], 12)
    assert (engine.failed_requests(), engine.stats().num_requests_finished) == ([], 2)
    assert run_all(engine, [request("c", [1], 3)])["c"] == continuation([1], 3)


def test_constrained_interrupt_is_not_the_requests():
    engine, _ = make_engine()
    engine.add_request(request("a", [1, 2], 8, constraint=Raising("advance", KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        finish(engine)


@pytest.mark.parametrize("constraint", [DeadEnd(0), Failing(0)])
def test_constrained_that_allows_no_first_token_is_refused_and_the_engine_goes_on(constraint):
    engine, _ = make_engine()
    with pytest.raises(ValueError, match=r"no token to begin with|no first token: lost"):
        engine.add_request(request("a", [1], constraint=constraint))
    assert not engine.has_unfinished()
    assert run_all(engine, [request("a", [1])]) == {"a": continuation([1], 5)}


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_constrained_preempted_keeps_its_place(stages):
    engine, _ = make_engine(num_kv_pages=6, enable_prefix_caching=False, pipeline_parallel_size=stages)
    requests = [request(i, [i, 2, 3], 38, constraint=Residues(37)) for i in range(4)]
    assert_own_texts(run_all(engine, requests, want_events=True), requests)
    assert engine.stats().num_preemptions


@pytest.mark.parametrize("stages", [1, 2])
def test_constrained_samples_of_one_prompt_have_a_state_each(stages):
    engine, _ = make_engine(pipeline_parallel_size=stages)
    requests = [request(i, range(11), 9, constraint=Residues(7), top_k=2, seed=i) for i in (1, 2, 3)]
    for entry in requests:
        engine.add_request(entry, prefix_source=None if entry is requests[0] else "1")
    assert_own_texts(finish(engine), requests)


@pytest.mark.parametrize("stages", [1, 2])
def test_constrained_first_mask_is_checked_and_used_from_one_state(stages):
    """Four tokens take a mask each and, behind the last one, another that says whether the text could go on."""
    engine, _ = make_engine(pipeline_parallel_size=stages)
    constraint = Counting()
    entry = request("a", [1, 2], 4, constraint=constraint)
    engine.add_request(entry)
    assert (constraint.num_states, constraint.num_masks) == (1, 1)
    finish(engine)
    assert (constraint.num_states, constraint.num_masks) == (1, 1 + 4)
