"""Confined programs: what the child itself says of its environment, its limits and its network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.sandbox import confined

PROGRAM = """
import json, os, resource, socket, sys
def connects(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
def writes(file):
    try:
        open(file, "wb", buffering=0).write(b"x")
    except OSError:
        return False
    return True
def main(arguments):
    print(json.dumps({
        "environment": sorted(os.environ),
        "modules": [name for name in sys.modules if name.startswith("jax")],
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in arguments[2:]},
        "connects": connects(int(arguments[0])),
        "writes": writes(arguments[1]),
    }))
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has none of the limits")


@pytest.fixture
def program(tmp_path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def ask(program: Path, *, port: int = 9, limits: dict[str, int]) -> dict:
    command = confined.command(program, str(port), str(program.with_name("file")), *limits, limits=limits)
    finished = subprocess.run(
        command, env=confined.environment(["", "/somewhere"]), capture_output=True, text=True, check=True
    )
    return json.loads(finished.stdout)


def test_child_has_no_environment_no_package_and_the_limits(program, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/python/lib")
    limits = {"RLIMIT_CPU": 7, "RLIMIT_NOFILE": 12}
    said = ask(program, limits=limits)
    # Python adds LC_CTYPE where the locale is C, as it does without variables.
    assert set(said["environment"]) - {"LC_CTYPE"} == {"PYTHONPATH", "LD_LIBRARY_PATH"}
    assert confined.environment(["", "/somewhere"])["PYTHONPATH"] == "/somewhere"
    assert said["modules"] == []
    assert said["limits"] == {name: [value, value] for name, value in limits.items()}
    assert not said["writes"]


def can_leave_network() -> bool:
    """Whether this kernel lets users make namespaces: the command of util-linux asks for the same ones."""
    command = ["unshare", "--user", "--net", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_leave_network(), reason="this system lets no user leave the network")
def test_child_has_no_network_where_the_system_allows_that(program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # as this process can
        assert not ask(program, port=port, limits={})["connects"]


def test_child_that_is_no_program_says_so(tmp_path) -> None:
    finished = subprocess.run(confined.command(tmp_path / "none.py", limits={}), capture_output=True, text=True)
    assert finished.returncode == 1 and "No such file or directory" in finished.stderr
