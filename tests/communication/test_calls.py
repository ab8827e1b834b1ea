"""Calls that all processes make get the leader's result; those that differ are an error on all."""

import pytest
from group_tools import Group, at_once, wait_until

from jaxinfer.communication.calls import FollowingCalls, LeadingCalls
from jaxinfer.communication.connection import Message
from jaxinfer.communication.process_group import GatherError, Kind
from jaxinfer.errors import EngineClosedError, ProcessLostError


class Run(Group):
    """A run whose processes have calls; followers learn of engines as they come."""

    def __init__(self, num_processes=3):
        self.calls = {}

        def prepare(process):
            if process.is_leader:
                self.calls[0] = LeadingCalls(process)
            else:
                self.calls[process.process_id] = calls = FollowingCalls(process)
                process.handle(Kind.OPEN, lambda _, message: calls.open(message))

        super().__init__(num_processes, prepare=prepare)
        self.leader, *self.followers = [self.calls[number] for number in range(num_processes)]

    def open(self, description="a model"):
        engine = self.leader.open(description)
        assert [calls.peek_opened() for calls in self.followers] == [description] * len(self.followers)
        assert [calls.next_opened() for calls in self.followers] == [(engine, description)] * len(self.followers)
        return engine

    def lead(self, engine, number, description, result):
        def lead():
            if self.leader.begin(engine, number, description):
                self.leader.end(engine, number, result)
            return result

        return lead


def test_calls_of_all_processes_get_the_leaders_result():
    with Run() as run:
        engines = [run.open("one"), run.open("two")]
        assert engines == [0, 1]
        for number in range(3):
            for engine in engines:
                result = {"outputs": [engine, number]}
                makes = [lambda calls=calls, e=engine: calls.make(e, "same") for calls in run.followers]
                assert at_once(run.lead(engine, number, "same", result), *makes) == [result] * 3
        assert not run.leader._made


def test_different_calls_are_an_error_on_all_that_names_the_processes():
    with Run() as run:
        engine = run.open()
        found = at_once(
            run.lead(engine, 0, "score", {}),
            lambda: run.followers[0].make(engine, "score"),
            lambda: run.followers[1].make(engine, "generate"),
        )
        message = "process 2 calls generate, process 0 calls score; make the same calls on all processes"
        assert isinstance(found[0], GatherError) and str(found[0]).startswith(message)
        for result in found[1:]:
            assert result["error"] == "GatherError" and result["message"].startswith(message)
        again = [lambda calls=calls: calls.make(engine, "same") for calls in run.followers]
        assert at_once(run.lead(engine, 1, "same", {"x": 1}), *again) == [{"x": 1}] * 3


def test_processes_that_follow_are_not_waited_for_and_get_nothing():
    with Run() as run:
        engine = run.open()
        for calls in run.followers:
            calls.follow(engine)
        assert run.leader.begin(engine, 0, "alone") is False
        assert run.leader.begin(engine, 1, "alone") is False
        other = run.open()  # for another engine nobody has said so
        makes = [lambda calls=calls: calls.make(other, "same") for calls in run.followers]
        assert at_once(run.lead(other, 0, "same", {"x": 1}), *makes) == [{"x": 1}] * 3


def test_process_that_has_ended_is_named_instead_of_waited_for():
    with Run(2) as run:
        engine = run.open()
        run.processes[1].send(Message(Kind.LEAVE))
        with pytest.raises(GatherError, match="process 1 has ended, process 0 calls score"):
            run.leader.begin(engine, 0, "score")


def test_call_of_an_engine_that_the_leader_closes_ends():
    with Run(2) as run:
        engine = run.open()
        (calls,) = run.followers
        _, error = at_once(lambda: calls.close(engine), lambda: calls.make(engine, "score"))
        assert isinstance(error, EngineClosedError) and "process 0 has closed the LLM, process 1 calls score" in str(
            error
        )
        calls.await_close(engine)
        assert calls.is_closed(engine)


def test_leader_that_ends_ends_the_wait_for_its_next_engine():
    with Run(2) as run:
        _, error = at_once(lambda: run.processes[0].send(Message(Kind.LEAVING)), lambda: run.followers[0].peek_opened())
        assert isinstance(error, EngineClosedError)


def test_calls_of_a_lost_run_raise():
    with Run(2) as run:
        engine = run.open()
        run.processes[0].fail(ValueError("x"))
        wait_until(lambda: 1 in run.lost)
        for call in (lambda: run.leader.begin(engine, 0, "score"), lambda: run.followers[0].make(engine, "score")):
            with pytest.raises(ProcessLostError, match="process 0 of 2 failed: ValueError: x"):
                call()
