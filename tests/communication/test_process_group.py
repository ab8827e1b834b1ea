"""Processes of a run agree, notice when one is lost, and end together."""

import threading
import time

import pytest
from group_tools import Group, wait_until

from jaxinfer.communication.connection import Message
from jaxinfer.communication.process_group import GatherError, Kind, Members
from jaxinfer.communication.progress import Progress
from jaxinfer.errors import EngineClosedError, ProcessLostError


def test_gather_all_get_the_values_in_order():
    with Group(3) as group:
        for round_ in range(3):
            found = group.each(lambda process, r=round_: process.gather("pages", f"{r}:{process.process_id}"))
            assert found == [[f"{round_}:{i}" for i in range(3)]] * 3
        assert not group.lost


def test_agree_names_a_process_that_differs_and_both_values():
    with Group(3) as group:
        errors = group.each(lambda process: process.agree("dtype", "a" if process.process_id < 2 else "b"))
        assert {str(error) for error in errors} == {
            "dtype must be the same on all processes: process 0 has a, process 2 has b"
        }
        assert group.each(lambda process: process.agree("dtype", "a")) == [None] * 3


def test_gather_processes_at_different_places_say_so():
    with Group(2) as group:
        errors = group.each(lambda process: process.gather(f"topic {process.process_id}"))
        assert all(isinstance(error, GatherError) and "run the same script" in str(error) for error in errors)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_together_error_on_one_process_is_raised_on_all_and_the_run_goes_on(failing):
    def work(process):
        with process.together("loading"):
            if process.process_id == failing:
                raise FileNotFoundError("no such model")
            process.gather("inside")  # the others are further on

    with Group(3) as group:
        errors = group.each(work)
        assert isinstance(errors.pop(failing), FileNotFoundError)
        assert {str(error) for error in errors} == {
            f"process {failing} failed (loading): FileNotFoundError: no such model"
        }
        assert group.each(lambda process: process.gather("next", "x")) == [["x"] * 3] * 3
        assert not group.lost


SOME = Members((1, 2), task=7)


def test_gather_among_some_is_known_to_them_and_to_the_leader_alone():
    with Group(4) as group:
        for round_ in range(3):
            found = group.each(
                lambda process, r=round_: process.gather("pages", f"{r}:{process.process_id}", among=SOME),
                group.processes[1:3],
            )
            assert found == [[f"{round_}:1", f"{round_}:2"]] * 2  # before the leader has asked for it
            assert group.processes[0].gather("pages", among=SOME) == found[0]
        assert group.each(lambda process: process.gather("all", str(process.process_id))) == [["0", "1", "2", "3"]] * 4
        assert not group.lost


@pytest.mark.parametrize("failing", [1, 2])
def test_together_error_among_some_is_raised_by_them_by_the_leader_and_then_by_all(failing):
    def work(process):
        with process.together("making"):
            if process.process_id == 3:
                return
            with process.together("loading", among=SOME):
                if process.process_id == failing:
                    raise FileNotFoundError("no such model")
                process.gather("pages", among=SOME)

    with Group(4) as group:
        errors = group.each(work)
        assert isinstance(errors[failing], FileNotFoundError)
        assert all(isinstance(error, GatherError) for error in errors[:failing] + errors[failing + 1 :])
        assert all("process " in str(error) and "no such model" in str(error) for error in errors[:failing])
        assert "no such model" in str(errors[3])
        assert group.each(lambda process: process.gather("next", "x")) == [["x"] * 4] * 4
        assert not group.lost


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_process_that_fails_before_the_gathering_that_the_leader_waits_for_is_named(delay):
    alone = Members((1,), 7)

    def work(process):
        with process.together("making"):
            if process.is_leader:
                time.sleep(0.2 - delay)
                process.gather("pages", among=alone)
            else:
                time.sleep(delay)
                raise ValueError("wrong")

    with Group(2) as group:
        errors = group.each(work)
        assert [type(error) for error in errors] == [GatherError, ValueError]
        assert "process 1 failed" in str(errors[0]) and "ValueError: wrong" in str(errors[0])
        assert group.each(lambda process: process.gather("next", "x")) == [["x"] * 2] * 2
        assert not group.lost and not group.processes[0]._given


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_process_that_fails_before_a_gathering_among_some_does_not_keep_them_waiting(delay):
    def work(process):
        with process.together("making"):
            if process.process_id < 2:
                with process.together("loading a", among=Members((0, 1), 7)):
                    raise ValueError("wrong")
            time.sleep(delay)
            with process.together("loading b", among=Members((1, 2), 7)):
                process.gather("pages", among=Members((1, 2), 7))

    with Group(3) as group:
        errors = group.each(work)
        assert [type(error) for error in errors] == [ValueError, ValueError, GatherError]
        assert "ValueError: wrong" in str(errors[2])
        assert group.each(lambda process: process.gather("next", "x")) == [["x"] * 3] * 3
        assert not group.lost and not group.processes[0]._failed


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_connection_ends_all_with_its_process_named(lost):
    with Group(3) as group:
        group.processes[lost]._error = ProcessLostError("killed")  # it says nothing more itself
        for peer in group.processes[lost]._peers:
            peer.connection.close()
        others = [i for i in range(3) if i != lost]
        wait_until(lambda: set(others) <= set(group.lost))
        assert {group.lost[i].split(":")[0] for i in others} == {f"process {lost} of 3 was lost"}


def test_silent_process_is_lost_after_a_while_and_named_by_all(monkeypatch):
    with Group(3, silence=2.0) as group:
        wait_until(lambda: not group.lost, 1)
        group.processes[1]._error = ProcessLostError("stopped")  # its heartbeats end
        wait_until(lambda: {0, 2} <= set(group.lost))
        assert group.lost[0] == group.lost[2] == "process 1 of 3 was lost: nothing was heard of it for 2 s"


def test_failed_process_is_named_with_its_error_by_all():
    with Group(3) as group:
        error = group.processes[2].fail(ArithmeticError("bad luck"))
        assert isinstance(error, ProcessLostError) and isinstance(error, EngineClosedError)
        wait_until(lambda: len(group.lost) == 3)
        assert set(group.lost.values()) == {"process 2 of 3 failed: ArithmeticError: bad luck"}


def test_fail_names_the_process_that_is_lost_if_that_is_the_reason():
    with Group(2) as group:
        threading.Timer(0.3, group.processes[1]._peers[0].connection.close).start()
        error = group.processes[0].fail(ValueError("a collective failed"))
        assert str(error).startswith("process 1 of 2 was lost")


def test_fail_names_the_process_that_failed_rather_than_one_whose_engine_it_closed():
    with Group(2) as group:
        reasons = [ArithmeticError("bad luck"), EngineClosedError("process 0 has closed the LLM")]
        errors = group.each(lambda process: process.fail(reasons[process.process_id]))
        assert {str(error) for error in errors} == {"process 0 of 2 failed: ArithmeticError: bad luck"}


def test_lost_run_ends_waiting_threads_and_later_calls():
    with Group(2) as group:
        leader, follower = group.processes
        waiting = threading.Timer(0.2, follower.fail, (ValueError("x"),))
        waiting.start()
        with pytest.raises(ProcessLostError, match="process 1 of 2 failed"):
            leader.gather("what the other never sends")
        with pytest.raises(ProcessLostError, match="process 1 of 2 failed"):
            leader.send(Message(Kind.STEP))
        told = []

        class Listener:
            def lose(self, error):
                told.append(str(error))

        listener = Listener()
        leader.when_lost(listener)
        assert told == [str(leader.error)]


def test_unknown_message_and_broken_heartbeat_end_the_run():
    for message in (Message(99), Message(Kind.HEARTBEAT, payload=b"short")):
        with Group(2) as group:
            group.processes[1].send(message)
            wait_until(lambda group=group: 0 in group.lost)
            assert group.lost[0].startswith("process 1 of 2 was lost: ")


def test_leave_waits_for_all_and_nobody_is_lost():
    with Group(3) as group:
        left = []

        def leave(process):
            time.sleep(0.2 * process.process_id)
            left.append(("asks", process.process_id))
            process.leave()
            left.append(("left", process.process_id))

        assert group.each(leave) == [None] * 3
        assert [what for what, _ in left] == ["asks"] * 3 + ["left"] * 3
        time.sleep(0.1)
        assert not group.lost


def test_leave_does_not_wait_for_a_process_that_is_lost():
    with Group(2) as group:
        threading.Timer(0.2, group.processes[1]._peers[0].connection.close).start()
        with pytest.raises(ProcessLostError, match="process 1 of 2 was lost"):
            group.processes[0].leave()


def test_stuck_process_ends_the_run_by_the_leaders_watch():
    def prepare(process):
        process.report_progress(lambda: Progress(is_compiling=process.process_id == 2))
        if process.is_leader:
            process.watch(lambda: [1] * process.progress_of(2).is_compiling)

    with Group(3, prepare=prepare, step=5.0) as group:
        wait_until(lambda: len(group.lost) == 3)
        assert set(group.lost.values()) == {"process 1 of 3 is stuck: a step did not end within 5 s"}
