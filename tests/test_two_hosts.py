"""A run over two hosts with a link between them; each host is a network namespace with a name of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_lines import requests, write
from conftest import load_golden
from mesh_tools import BASE, on_mesh
from process_script import run_calls
from processes import TESTS, Children, simulating
from test_processes import arguments_of, assert_equal_to_one_process, calls_of, found_by

from jaxinfer.communication.ending import EXIT_LOST

HOSTS = {"one": "10.77.0.1", "two": "10.77.0.2"}
ENTER = ("--net", "--uts", "--mount")


@functools.cache
def has_namespaces() -> bool:
    """Whether this user may make namespaces and links between them."""
    try:
        subprocess.run(["unshare", *ENTER, "ip", "link", "set", "lo", "up"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif("not has_namespaces()", reason="needs root, unshare and ip"),
]


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes two hosts with a link between them, which end with the block."""
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in HOSTS:
            silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            processes.append(process := subprocess.Popen(["unshare", *ENTER, "sleep", "600"], **silent))
            stack.callback(process.wait)
            stack.callback(process.kill)
        own = os.readlink("/proc/self/ns/net")
        while any(os.readlink(f"/proc/{process.pid}/ns/net") == own for process in processes):
            time.sleep(0.01)
        ends = [("veth0", processes[0].pid), ("veth1", processes[1].pid)]
        (first, first_pid), (second, second_pid) = ends
        link = f"ip link add {first} netns {first_pid} type veth peer name {second} netns {second_pid}"
        subprocess.run(link.split(), check=True)
        hosts = Hosts(processes)
        names = "".join(f"{address} {name}\\n" for name, address in HOSTS.items())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for number, (name, address) in enumerate(HOSTS.items()):
            file = Path(folder) / name
            file.touch()
            hosts.run(
                number,
                f"hostname {name}; ip addr add {address}/24 dev veth{number}; ip link set veth{number} up; "
                f"ip link set lo up; printf '127.0.0.1 localhost\\n{names}' > {file}; mount --bind {file} /etc/hosts",
            )
        yield hosts


class Hosts:
    """Two hosts.

    Args:
      processes: the first process of each, in whose namespaces others can run.
    """

    def __init__(self, processes: list[subprocess.Popen]):
        self.processes = processes

    def enter(self, number: int) -> list[str]:
        """The beginning of a command that runs on a host."""
        return ["nsenter", "-t", str(self.processes[number].pid), *ENTER]

    def run(self, number: int, script: str) -> None:
        subprocess.run([*self.enter(number), "sh", "-ec", script], check=True)

    def listened_on(self, number: int) -> set[str]:
        """The addresses, in hexadecimal digits, on which a host's processes listen."""
        pid = self.processes[number].pid
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        return set(re.findall(r"^ *\d+: ([0-9A-F]+):\S+ \S+ 0A ", "".join(tables), re.MULTILINE))


@contextlib.contextmanager
def run_on(hosts: Hosts, calls, **others):
    arguments = arguments_of(2, "llama", calls, address="one:12421", engine={"tensor_parallel_size": 2}, **others)
    commands = [[*hosts.enter(number), sys.executable, *arguments.command(number)] for number in range(2)]
    with Children(*commands, **arguments.environment(1)) as children:
        yield children


def test_two_hosts_give_what_one_process_gives_and_listen_on_their_own_addresses(few_programs):
    calls = calls_of("llama")[:1]
    with two_hosts() as hosts, run_on(hosts, calls, fault=(-1, "")) as children:
        children.wait_for("generates", seconds=200)
        found, addresses = found_by(children), [hosts.listened_on(number) for number in range(2)]
    for number, address in enumerate(HOSTS.values()):
        own = bytes(map(int, address.split(".")))[::-1].hex().upper()
        assert addresses[number] <= {own, f"0000000000000000FFFF0000{own}"}, addresses
    with on_mesh("llama", (1, 1), tokenizer="byte") as llm:
        assert_equal_to_one_process(found, run_calls(llm, calls))


def test_launch_on_two_hosts_answers_a_batch_as_one_process_does(tmp_path):
    source = write(tmp_path / "in.jsonl", requests(60))
    flags = [word for name, value in BASE.items() for word in (f"--{name}".replace("_", "-"), value)]
    flags += ["--model", load_golden("mesh/llama").path, "--tokenizer", "byte"]
    program = [sys.executable, "-m", "jaxinfer"]
    settings = {"PYTHONPATH": str(TESTS.parent), "JAXINFER_SECRET": "a secret of the tests"}
    settings["XLA_FLAGS"] = simulating(1)
    with Children([*program, "batch", source, tmp_path / "alone.jsonl", *flags], **settings) as children:
        assert children.codes(0, seconds=200) == [0], children.err(0)
    command = ["batch", source, tmp_path / "both.jsonl", *flags, "--data-parallel-size", 2]
    launch = [*program, "launch", "--processes", 1, "--hosts", "one,two", "--", *command]
    with two_hosts() as hosts:
        commands = [[*hosts.enter(number), *launch] for number in range(2)]
        with Children(*commands, **settings) as children:
            assert children.codes(0, 1, seconds=300) == [0, 0], [children.err(0), children.err(1)]
    lines = [sorted((tmp_path / name).read_text().splitlines()) for name in ("alone.jsonl", "both.jsonl")]
    assert lines[0] == lines[1] and len(lines[0]) == 60


def test_cut_link_ends_both_hosts_with_the_other_ones_name(few_programs):
    with two_hosts() as hosts, run_on(hosts, [], fault=(-1, ""), patience={"silence": 3.0}) as children:
        children.wait_for("generates", seconds=200)
        time.sleep(0.5)
        hosts.run(0, "ip link set veth0 down")
        began = time.monotonic()
        assert children.codes(0, 1, seconds=3 + 15) == [EXIT_LOST] * 2, [children.err(0), children.err(1)]
        print(f"both hosts ended {time.monotonic() - began:.1f} s after the link was cut")
        for number in (0, 1):
            assert f"process {1 - number} of 2 was lost: " in children.err(number)
