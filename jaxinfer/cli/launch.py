"""`jaxinfer launch`: starts the processes of a run, or makes this one of the processes that a cluster has started.

Owns: the variables that processes are started with, showing what they print, forwarding signals, their exit codes.
Does not know: jax, what the processes do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

from jaxinfer.communication.ending import EXIT_LOST
from jaxinfer.communication.membership import (
    ADDRESS,
    DEFAULT_PORT,
    LOCAL_PROCESS_ID,
    NUM_LOCAL_PROCESSES,
    NUM_PROCESSES,
    PROCESS_ID,
    SECRET,
    Membership,
    find_membership,
    join_address,
)

_PATIENCE_SECONDS = 30.0
"""How long the others may take to end by themselves after one process has failed."""
_POLL_SECONDS = 0.05


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether this process was started by `jaxinfer launch`."""
    return PROCESS_ID in environment


def plan_processes(
    *, num_processes: int, hosts: Sequence[str], port: int | None, environment: Mapping[str, str]
) -> list[Membership]:
    """The processes to start on this machine.

    Args:
      num_processes: processes on every machine.
      hosts: all machines, the first of which leads; none starts processes on this machine only.
      port: on which process 0 listens; None is DEFAULT_PORT, or a free one if there is only this machine.
      environment: has the secret if there are several machines.

    Raises:
      ValueError: this machine is not among the hosts, or there is no secret.
    """
    secret, first, address = environment.get(SECRET, ""), 0, ""
    if hosts:
        first = _own_place(hosts) * num_processes
        address = join_address(hosts[0], port or DEFAULT_PORT)
    else:
        secret = secret or secrets.token_hex(16)
        address = join_address("127.0.0.1", port or _free_port())
    return [
        Membership(
            address=address,
            num_processes=num_processes * max(len(hosts), 1),
            process_id=first + number,
            num_local_processes=num_processes,
            local_process_id=number,
            secret=secret,
        )
        for number in range(num_processes)
    ]


def variables(membership: Membership) -> dict[str, str]:
    """The environment variables that tell a process which one it is."""
    return {
        ADDRESS: membership.address,
        NUM_PROCESSES: str(membership.num_processes),
        PROCESS_ID: str(membership.process_id),
        NUM_LOCAL_PROCESSES: str(membership.num_local_processes),
        LOCAL_PROCESS_ID: str(membership.local_process_id),
        SECRET: membership.secret,
    }


def become_process(command: Sequence[str]) -> None:
    """Replaces this process by a command, as the process of the run that Slurm or the like has made it.

    Raises:
      ValueError: the environment does not say which process this is.
      OSError: there is no such command.
    """
    environment = os.environ | variables(find_membership(os.environ))
    os.execvpe(command[0], list(command), environment)


def run_processes(command: Sequence[str], members: Sequence[Membership]) -> int:
    """Starts a command in several processes and waits until all have ended.

    The first of them has this process's input and output; what others print is marked with their numbers. SIGTERM is
    passed on; Ctrl-C reaches them from the terminal.

    Returns:
      0 if all have returned 0; otherwise the code of a process that failed by itself rather than because of another.
    """
    children: list[subprocess.Popen[bytes]] = []
    with _forwarding(children):
        for member in members:
            is_first = member is members[0]
            children.append(
                subprocess.Popen(
                    list(command),
                    env=os.environ | variables(member),
                    stdin=None if is_first else subprocess.DEVNULL,
                    stdout=None if is_first else subprocess.PIPE,
                    stderr=None if is_first else subprocess.PIPE,
                )
            )
        readers = [
            threading.Thread(target=_show, args=(stream, target, member.process_id), daemon=True)
            for child, member in zip(children[1:], members[1:], strict=True)
            for stream, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
            if stream is not None
        ]
        for reader in readers:
            reader.start()
        codes = _await(children)
        for reader in readers:
            reader.join(1.0)
    failed = [code if code > 0 else 128 - code for code in codes if code]
    return next((code for code in failed if code != EXIT_LOST), EXIT_LOST if failed else 0)


def _await(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all children; those that do not end soon after one has failed are killed."""
    deadline = None
    while None in (codes := [child.poll() for child in children]):
        if deadline is None and any(codes):
            deadline = time.monotonic() + _PATIENCE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
        with contextlib.suppress(KeyboardInterrupt):  # the children have got it, too
            time.sleep(_POLL_SECONDS)
    return [child.returncode for child in children]


@contextlib.contextmanager
def _forwarding(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Passes SIGTERM on to one child, which lets all of them end; kills all if the block is left by an error."""

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in children:
            if child.poll() is None:
                child.kill()


def _show(stream: IO[bytes], target: IO[str], process_id: int) -> None:
    with stream:
        for line in stream:
            print(f"[{process_id}] {line.decode(errors='replace')}", end="", file=target, flush=True)


def _own_place(hosts: Sequence[str]) -> int:
    """The place of this machine in a list of names or addresses."""
    for place, host in enumerate(hosts):
        if _is_own(host):
            return place
    raise ValueError(f"--hosts must name all machines, this one ({socket.gethostname()}) too, got {','.join(hosts)}")


def _is_own(host: str) -> bool:
    """Whether a name or address is one of this machine: whether one can listen on it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
