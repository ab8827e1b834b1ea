"""`jaxinfer launch` starts processes that know which one they are, and returns how they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import TESTS, Children, simulating

from jaxinfer.cli.launch import plan_processes, run_processes, variables
from jaxinfer.communication.membership import find_membership

SHOW = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('JAXINFER_')}))"


def python(script):
    return [sys.executable, "-c", script]


def plan(num_processes, hosts=(), environment=None):
    return plan_processes(num_processes=num_processes, hosts=hosts, port=None, environment=environment or {})


def test_plan_local_processes_share_an_address_of_this_machine_only_and_a_secret():
    first, second = plan(2)
    assert first.address == second.address and first.address.startswith("127.0.0.1:")
    assert first.secret == second.secret and len(first.secret) == 32 and plan(1)[0].secret != first.secret
    assert [(entry.process_id, entry.num_processes) for entry in (first, second)] == [(0, 2), (1, 2)]
    assert [(entry.local_process_id, entry.num_local_processes) for entry in (first, second)] == [(0, 2), (1, 2)]


def test_plan_on_the_second_of_two_machines_goes_on_with_the_numbers():
    members = plan(3, ["192.0.2.1", "localhost"], {"JAXINFER_SECRET": "of the cluster"})
    assert [(entry.process_id, entry.num_processes) for entry in members] == [(3, 6), (4, 6), (5, 6)]
    assert {(entry.address, entry.secret) for entry in members} == {("192.0.2.1:12421", "of the cluster")}
    assert [entry.local_process_id for entry in members] == [0, 1, 2]


def test_plan_machines_without_a_secret_or_without_this_one_are_errors():
    with pytest.raises(ValueError, match="JAXINFER_SECRET to the same random text"):
        plan(1, ["localhost", "192.0.2.1"])
    with pytest.raises(ValueError, match=r"--hosts must name all machines, this one \(.*\) too, got 192.0.2.1"):
        plan(1, ["192.0.2.1"], {"JAXINFER_SECRET": "of the cluster"})


def test_variables_tell_a_process_who_it_is():
    for member in plan(2):
        assert find_membership(variables(member)) == member


def test_run_processes_each_gets_its_variables_and_only_the_others_are_marked(capfd):
    assert run_processes(python(SHOW), plan(3)) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    marks = [line[: line.index("{")] for line in lines]
    assert marks == ["[1] ", "[2] ", ""]
    found = [json.loads(line[len(mark) :]) for mark, line in zip(marks, lines, strict=True)]
    assert [entry["JAXINFER_PROCESS_ID"] for entry in found] == ["1", "2", "0"]


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([75, 3], 3), ([0, 75], 75), ([75, -signal.SIGKILL], 137), ([1, 75], 1)]
)
def test_run_processes_returns_the_code_of_the_one_to_blame(codes, code):
    script = "import os, signal; code = {}[int(os.environ['JAXINFER_PROCESS_ID'])]; "
    script += "os.kill(os.getpid(), -code) if code < 0 else os._exit(code)"
    assert run_processes(python(script.format(codes)), plan(2)) == code


def test_run_processes_kills_those_that_stay_after_one_has_failed(monkeypatch):
    monkeypatch.setattr("jaxinfer.cli.launch._PATIENCE_SECONDS", 0.3)
    script = "import os, time; time.sleep(100) if os.environ['JAXINFER_PROCESS_ID'] == '0' else os._exit(4)"
    started = time.monotonic()
    assert run_processes(python(script), plan(2)) in (4, 137)
    assert time.monotonic() - started < 60


def test_launch_passes_sigterm_on():
    script = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    script += "print(os.environ['JAXINFER_PROCESS_ID'], 'is ready', flush=True); time.sleep(100)"
    launch = [sys.executable, "-c", LAUNCH, *python(script)]
    with Children(launch, PYTHONPATH=f"{TESTS}:{TESTS.parent}") as children:
        children.wait_for("0 is ready", seconds=20)
        children.wait_for("[1] 1 is ready", seconds=20)
        children.processes[0].send_signal(signal.SIGTERM)
        assert children.codes(0, seconds=10) == [0]


# As the command does, without the seconds in which the whole package is imported.
LAUNCH = """
import os, sys, types
package = types.ModuleType("jaxinfer")
package.__path__ = [os.path.join(os.environ["PYTHONPATH"].split(":")[1], "jaxinfer")]
sys.modules["jaxinfer"] = package
from jaxinfer.cli.launch import plan_processes, run_processes
sys.exit(run_processes(sys.argv[1:], plan_processes(num_processes=2, hosts=(), port=None, environment={})))
"""


def jaxinfer(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jaxinfer", *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": simulating(1)} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.matrix
def test_launch_prints_the_very_text_of_one_process():
    command = ["generate", "In the beginning", "--max-tokens", 24]
    alone = jaxinfer(*command)
    together = jaxinfer("launch", "--processes", 2, "--", *command, "--tensor-parallel-size", 2)
    assert together.returncode == alone.returncode == 0, together.stderr
    assert together.stdout == alone.stdout != ""


@pytest.mark.matrix
def test_launch_as_a_process_of_slurm_reads_its_variables():
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    finished = jaxinfer("launch", "--", *python(SHOW), **slurm)
    assert json.loads(finished.stdout)["JAXINFER_ADDRESS"] == "localhost:51007", finished.stderr


@pytest.mark.matrix
def test_launch_a_process_without_a_place_says_what_is_missing():
    finished = jaxinfer("launch", "--", "generate", "x")
    assert finished.returncode == 1
    assert "cannot find out address (JAXINFER_ADDRESS)" in finished.stderr and finished.stderr.count("\n") == 1
