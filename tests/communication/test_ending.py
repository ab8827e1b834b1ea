"""Real processes end together: in good order when they are asked to, and soon after one of them is lost."""

import contextlib
import signal
import sys
from pathlib import Path

import pytest
from group_tools import free_address
from processes import Children

from jaxinfer.communication.ending import EXIT_LOST

SILENCE, GRACE = 4.0, 1.0
# The package is entered without its __init__, which imports jax: that would take most of a test's time.
SCRIPT = f"""
import sys, time, types
package = types.ModuleType("jaxinfer")
package.__path__ = [sys.argv[5]]
sys.modules["jaxinfer"] = package
from jaxinfer.communication.ending import EXIT_LOST, ProcessEnd, end_later
from jaxinfer.communication.follower import Follower
from jaxinfer.communication.leader import Leader
from jaxinfer.communication.progress import Patience
from group_tools import meet

number, count, address, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
patience = Patience(silence={SILENCE}, drain=5.0, grace={GRACE})
found, _ = meet(number, address, num_processes=count)
settings = dict(patience=patience, on_lost=lambda error: end_later(patience.grace, EXIT_LOST))
group = Leader(found, **settings) if number == 0 else Follower(number, count, found, **settings)
end = ProcessEnd(group)

class Engine:
    def drain(self, seconds):
        time.sleep(0.3)
        print("drained", flush=True)
    def close(self):
        print("closed", flush=True)

engine = Engine()
group.attach(engine)
group.start()
group.settle()
end.install()
print("ready", flush=True)
if what == "ends":
    sys.exit()
if what == "raises" and number == 1:
    raise ArithmeticError("bad luck")
if what == "exits with 3":
    sys.exit(3 if number == 1 else 0)
if what == "sleeps":
    time.sleep(100)
try:
    group.wait_for(lambda: False)
finally:
    print("finally", flush=True)
"""


@contextlib.contextmanager
def run(count, what="waits"):
    """Processes of a run, which have met; see SCRIPT for what they do then."""
    address, tests = free_address(), Path(__file__).parent
    package = tests.parent.parent / "jaxinfer"
    arguments = [count, address, what, package]
    commands = [[sys.executable, "-c", SCRIPT, i, *arguments] for i in range(count)]
    with Children(*commands, PYTHONPATH=str(tests)) as children:
        children.wait_for("ready", seconds=20)
        yield children


def test_processes_that_end_close_their_engines_and_leave_with_code_0():
    with run(3, "ends") as children:
        assert children.codes(0, 1, 2, seconds=10) == [0, 0, 0]
        assert [children.out(i) + children.err(i) for i in range(3)] == ["ready\nclosed\n"] * 3


def test_exit_code_of_one_process_is_its_own():
    with run(2, "exits with 3") as children:
        assert children.codes(0, 1, seconds=10) == [0, 3]


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_others_with_its_name(killed):
    others = sorted({0, 1, 2} - {killed})
    with run(3) as children:
        children.processes[killed].send_signal(signal.SIGKILL)
        assert children.codes(*others, seconds=5) == [EXIT_LOST] * 2
        for i in others:
            assert children.out(i) == "ready\nfinally\n"
            assert f"jaxinfer: process {killed} of 3 was lost: " in children.err(i)
            assert "ProcessLostError" in children.err(i)


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.matrix), 1])
def test_stopped_process_ends_the_others_after_a_silence(stopped):
    with run(2) as children:
        children.processes[stopped].send_signal(signal.SIGSTOP)
        assert children.codes(1 - stopped, seconds=SILENCE + 8) == [EXIT_LOST]
        assert f"process {stopped} of 2 was lost: nothing was heard of it for {SILENCE:g} s" in children.err(
            1 - stopped
        )


def test_raising_process_ends_all_with_its_error():
    with run(3, "raises") as children:
        assert children.codes(0, 1, 2, seconds=10) == [EXIT_LOST, 1, EXIT_LOST]
        assert "ArithmeticError: bad luck" in children.err(1)
        for i in (0, 2):
            assert "jaxinfer: process 1 of 3 failed: ArithmeticError: bad luck\n" in children.err(i)


def test_survivor_whose_main_thread_does_not_return_is_ended_after_its_grace():
    with run(2, "sleeps") as children:
        children.processes[1].send_signal(signal.SIGKILL)
        assert children.codes(0, seconds=GRACE + 4) == [EXIT_LOST]
        assert children.out(0) == "ready\n" and "jaxinfer: process 1 of 2 was lost" in children.err(0)


@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_on_any_process_drains_the_leader_and_ends_all_with_code_0(asked):
    with run(3) as children:
        children.processes[asked].send_signal(signal.SIGTERM)
        assert children.codes(0, 1, 2, seconds=10) == [0, 0, 0]
        assert children.out(0) + children.err(0) == "ready\ndrained\nfinally\nclosed\n"
        for i in (1, 2):
            assert children.out(i) + children.err(i) == "ready\nfinally\nclosed\n"
