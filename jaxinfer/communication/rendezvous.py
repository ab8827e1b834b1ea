"""How the processes of a run find each other when they start.

Owns: the leader's listening socket, connecting to it, and the checks that all processes belong to one run.
Does not know: jax, what is sent afterwards.

Everything that is wrong at the start ends all processes with the same line: the leader tells those that have connected.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

from jaxinfer.communication.connection import (
    Connection,
    ConnectionLostError,
    Greeting,
    RefusedError,
    greet,
    receive_greeting,
    send_refusal,
    send_welcome,
)
from jaxinfer.communication.membership import Membership, join_address, split_address

logger = logging.getLogger(__name__)
_RETRY_SECONDS = 0.2
_LATE_SECONDS = 2.0


def await_followers(
    membership: Membership,
    *,
    versions: Mapping[str, str],
    seconds: float,
    bind_host: str | None = None,
) -> tuple[dict[int, Connection], dict[str, Any]]:
    """Waits until all followers have connected; for process 0.

    Args:
      membership: of this process.
      versions: of the packages that have to be the same on all processes.
      seconds: how long to wait.
      bind_host: the address to listen on; None takes the one of membership.address. Only "0.0.0.0" or "::", if you
        ask for them, listen on all interfaces.

    Returns:
      The connections by process, and the facts that all processes have learned: "coordinator", the address for
      jax.distributed, which nobody listens on yet.

    Raises:
      TimeoutError: a process did not connect in time.
      RefusedError: a process has another secret, other versions or another number of processes, or two have the same
        number.
      OSError: the address is not one of this machine, or in use.
    """
    deadline = time.monotonic() + seconds
    host, port = split_address(membership.address)
    found: dict[int, Connection] = {}
    nonces: dict[int, bytes] = {}
    with _listen(bind_host or host, port, deadline) as listener:
        try:
            while len(found) < membership.num_processes - 1:
                missing = sorted(set(range(1, membership.num_processes)) - set(found))
                connection = _accept(listener, deadline, missing, membership.address)
                greeting = None
                try:
                    greeting, nonce = receive_greeting(connection, membership.secret)
                    _check(greeting, membership, versions, found)
                except RefusedError as error:
                    _refuse(connection, str(error))
                    raise
                except (ConnectionLostError, TimeoutError) as error:
                    logger.warning("a connection from %s is no process of this run: %s", connection.peer, error)
                    connection.close()
                    continue
                found[greeting.process_id], nonces[greeting.process_id] = connection, nonce
            bound = listener.getsockname()[0]
            facts = {"coordinator": join_address(host, _free_port(bound))}
            for number, connection in found.items():
                send_welcome(connection, membership.secret, nonces[number], **facts)
        except BaseException as error:
            reason = str(error) or type(error).__name__
            for connection in found.values():
                _refuse(connection, reason)
            _refuse_late(listener, reason)
            raise
    return dict(sorted(found.items())), facts


def find_leader(
    membership: Membership, *, versions: Mapping[str, str], seconds: float
) -> tuple[Connection, dict[str, Any]]:
    """Connects to process 0 and waits until all processes have; for the other processes.

    Args:
      membership, versions, seconds: as await_followers'.

    Returns:
      The connection, and the facts as await_followers returns them.

    Raises:
      TimeoutError: process 0 could not be reached in time, or was waiting for others for longer.
      RefusedError: the leader refuses this process or the whole run; the message says why.
      ConnectionLostError: the connection was lost, or something else answers at this address.
    """
    deadline = time.monotonic() + seconds
    stream = _connect(membership, deadline, seconds)
    connection = Connection(stream)
    greeting = Greeting(process_id=membership.process_id, num_processes=membership.num_processes, versions=versions)
    try:
        # The leader has begun to wait at another time, and says itself which process is missing.
        return connection, greet(connection, membership.secret, greeting, deadline=deadline + 5.0)
    except (ConnectionLostError, TimeoutError) as error:
        connection.close()
        raise type(error)(f"process 0 at {membership.address} did not answer as it should: {error}") from error
    except BaseException:
        connection.close()
        raise


def _connect(membership: Membership, deadline: float, seconds: float) -> socket.socket:
    host, port = split_address(membership.address)
    while True:
        try:
            stream = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1))
            if stream.getsockname() == stream.getpeername():  # a port of this machine can connect to itself
                stream.close()
                raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")
            return stream
        except OSError as error:  # the leader may start later, and its name may not be known yet
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise TimeoutError(
                    f"process 0 could not be reached at {membership.address} within {seconds:g} s: {error}"
                ) from error
            time.sleep(_RETRY_SECONDS)


def _listen(host: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror as error:  # in a cluster the name of a new host may become known a little later
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise OSError(f"the address of process 0 cannot be resolved: {host}: {error}") from error
            time.sleep(_RETRY_SECONDS)
    try:
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise OSError(
            error.errno, f"process 0 cannot listen on {join_address(host, port)} ({error.strerror}); give the address "
            "of this machine, and a free port"
        ) from error  # fmt: skip


def _refuse(connection: Connection, reason: str) -> None:
    with contextlib.suppress(ConnectionLostError):
        send_refusal(connection, reason)
    connection.close()


def _refuse_late(listener: socket.socket, reason: str) -> None:
    """Tells those that connect a little later, which would otherwise wait for a leader that is gone."""
    listener.settimeout(_LATE_SECONDS)
    with contextlib.suppress(TimeoutError):
        while True:
            stream, _ = listener.accept()
            _refuse(Connection(stream), reason)


def _accept(listener: socket.socket, deadline: float, missing: list[int], address: str) -> Connection:
    listener.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        stream, _ = listener.accept()
    except TimeoutError:
        names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        raise TimeoutError(f"process {names} did not connect to process 0 at {address} in time") from None
    return Connection(stream)


def _check(
    greeting: Greeting, membership: Membership, versions: Mapping[str, str], found: Mapping[int, Connection]
) -> None:
    number = greeting.process_id
    if greeting.num_processes != membership.num_processes:
        raise RefusedError(
            f"process {number} was started as one of {greeting.num_processes} processes, process 0 as one of "
            f"{membership.num_processes}"
        )
    if not 0 < number < membership.num_processes or number in found:
        raise RefusedError(f"two processes of the run say that they are process {number}")
    for name in sorted({*versions, *greeting.versions}):
        if greeting.versions.get(name) != versions.get(name):
            raise RefusedError(
                f"process {number} has {name} {greeting.versions.get(name)}, process 0 has {versions.get(name)}; "
                "install the same version everywhere"
            )


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.getsockname()[1]
