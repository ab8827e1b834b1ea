"""Messages between two processes over TCP.

Owns: the format of a message, and the handshake in which both sides prove that they know the run's secret.
Does not know: what messages mean, jax.

A message is a header of fixed layout (kind, number, size) and as many bytes as it says; nothing is ever unpickled. The
handshake authenticates both sides. What follows is neither signed nor encrypted: the network between the processes of a
run has to be trusted as much as the one that carries its activations.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_HEADER = struct.Struct("<4sB3xIQ")  # magic, kind, bytes of payload, number
_MAGIC = b"jxi1"
MAX_PAYLOAD = 1 << 28
"""Bytes of a message's payload, at most."""
_MAX_GREETING = 4096
"""The same before the other side has proved that it knows the secret."""
_GREETING_SECONDS = 10.0
_CHALLENGE, _HELLO, _WELCOME, _REFUSAL = range(4)
NONCE_BYTES = 32


class ConnectionLostError(OSError):
    """The other side closed the connection, or sent what is no message."""


class RefusedError(RuntimeError):
    """The other side does not take part in a run with this process; the message says why."""


class Message(NamedTuple):
    """One message.

    Args:
      kind: 0 .. 255; what kinds there are is up to both sides.
      number: 0 .. 2**64 - 1, which step or call it is about.
      payload: its bytes.
    """

    kind: int
    number: int = 0
    payload: bytes = b""


class Connection:
    """A TCP connection that carries messages; any thread may send, one thread receives.

    Args:
      stream: a connected socket, which belongs to the connection from now on.
    """

    def __init__(self, stream: socket.socket):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = stream
        self._sending = threading.Lock()

    @property
    def peer(self) -> str:
        """The address of the other side."""
        try:
            return str(self._stream.getpeername()[0])
        except OSError:
            return "a closed connection"

    def send(self, message: Message) -> None:
        """Sends a message; returns when the operating system has taken it.

        Raises:
          ConnectionLostError: the connection is broken.
          ValueError: the payload is longer than MAX_PAYLOAD.
        """
        kind, number, payload = message
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(
                f"a message can have {MAX_PAYLOAD} bytes, got {len(payload)}; send fewer outputs in a call"
            )
        data = _HEADER.pack(_MAGIC, kind, len(payload), number) + payload
        try:
            with self._sending:
                self._stream.sendall(data)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error

    def receive(self, *, max_payload: int = MAX_PAYLOAD) -> Message:
        """Waits for the next message.

        Raises:
          ConnectionLostError: the connection ended, or what came is no message.
          TimeoutError: the socket has a time limit, which passed.
        """
        magic, kind, size, number = _HEADER.unpack(self._receive_bytes(_HEADER.size))
        if magic != _MAGIC or size > max_payload:
            raise ConnectionLostError("received what is no message of jaxinfer")
        return Message(kind, number, self._receive_bytes(size))

    def _receive_bytes(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                count = self._stream.recv_into(view)
            except TimeoutError:
                raise
            except OSError as error:
                raise ConnectionLostError(str(error)) from error
            if not count:
                raise ConnectionLostError("the connection was closed")
            view = view[count:]
        return bytes(data)

    def limit_waiting(self, seconds: float | None) -> None:
        """Sets how long sending and receiving may wait; None is without limit."""
        self._stream.settimeout(seconds)

    def close(self) -> None:
        """Ends the connection, also for threads that are sending or receiving."""
        with contextlib.suppress(OSError):  # it may be broken already
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """What a connecting process says of itself.

    Args:
      process_id, num_processes: as Membership's.
      versions: of the packages that have to be the same on all processes.
    """

    process_id: int
    num_processes: int
    versions: Mapping[str, str]


def receive_greeting(connection: Connection, secret: str) -> tuple[Greeting, bytes]:
    """The leader's first part of the handshake: asks the other side who it is.

    Returns:
      What it says of itself, and its nonce for send_welcome.

    Raises:
      ConnectionLostError, TimeoutError: it does not speak like a process of jaxinfer.
      RefusedError: it does, but does not know the secret.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.limit_waiting(_GREETING_SECONDS)
    connection.send(Message(_CHALLENGE, payload=nonce))
    message = connection.receive(max_payload=_MAX_GREETING)
    signature, body = message.payload[:NONCE_BYTES], message.payload[NONCE_BYTES:]
    try:
        fields = json.loads(body)
        greeting = Greeting(
            process_id=int(fields["process_id"]),
            num_processes=int(fields["num_processes"]),
            versions={str(name): str(version) for name, version in fields["versions"].items()},
        )
        their_nonce = bytes.fromhex(fields["nonce"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConnectionLostError(f"received what is no greeting: {error}") from error
    if message.kind != _HELLO or len(their_nonce) != NONCE_BYTES:
        raise ConnectionLostError("received what is no greeting")
    if not hmac.compare_digest(signature, _sign(secret, b"hello", nonce, body)):
        raise RefusedError(f"process {greeting.process_id} ({connection.peer}) has another secret than process 0")
    connection.limit_waiting(None)
    return greeting, their_nonce


def send_welcome(connection: Connection, secret: str, nonce: bytes, **facts: Any) -> None:
    """The leader's last part of the handshake: proves that it knows the secret, and tells the run's facts."""
    body = json.dumps(facts).encode()
    connection.send(Message(_WELCOME, payload=_sign(secret, b"welcome", nonce, body) + body))


def send_refusal(connection: Connection, reason: str) -> None:
    """Ends a handshake; the other side gets a RefusedError with this reason."""
    connection.send(Message(_REFUSAL, payload=reason.encode()[:_MAX_GREETING]))


def greet(connection: Connection, secret: str, greeting: Greeting, *, deadline: float) -> dict[str, Any]:
    """The other side of the handshake: answers the leader's challenge and waits until all processes are there.

    Args:
      connection: to the leader.
      secret: the run's.
      greeting: what this process says of itself.
      deadline: time.monotonic() until when to wait for the welcome.

    Returns:
      The facts that the leader tells.

    Raises:
      RefusedError: the leader refuses this process or the run, or does not know the secret itself.
      ConnectionLostError, TimeoutError: the other side is no leader, or was lost.
    """
    connection.limit_waiting(_GREETING_SECONDS)
    challenge = _received(connection)
    if challenge.kind != _CHALLENGE or len(challenge.payload) != NONCE_BYTES:
        raise ConnectionLostError("received what is no challenge")
    nonce = secrets.token_bytes(NONCE_BYTES)
    fields = {
        "process_id": greeting.process_id,
        "num_processes": greeting.num_processes,
        "versions": dict(greeting.versions),
        "nonce": nonce.hex(),
    }
    body = json.dumps(fields).encode()
    connection.send(Message(_HELLO, payload=_sign(secret, b"hello", challenge.payload, body) + body))
    connection.limit_waiting(max(deadline - time.monotonic(), 0.1))
    answer = _received(connection)
    signature, facts = answer.payload[:NONCE_BYTES], answer.payload[NONCE_BYTES:]
    if answer.kind != _WELCOME or not hmac.compare_digest(signature, _sign(secret, b"welcome", nonce, facts)):
        raise RefusedError(f"process 0 ({connection.peer}) has another secret than process {greeting.process_id}")
    connection.limit_waiting(None)
    return json.loads(facts)


def _received(connection: Connection) -> Message:
    """The leader's next message in the handshake.

    Raises:
      RefusedError: it is a refusal.
    """
    message = connection.receive(max_payload=_MAX_GREETING)
    if message.kind == _REFUSAL:
        raise RefusedError(message.payload.decode(errors="replace"))
    return message


def _sign(secret: str, role: bytes, nonce: bytes, body: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + nonce + body, "sha256")
