"""The processes of a run: process 0 leads, the others follow it, and all end together.

Owns: one connection from the leader to every follower, the threads that listen and show that a process is alive,
agreeing on values, noticing that one is lost, and taking leave; leader.py and follower.py have what differs.
Does not know: jax, what the processes compute.

Every process sends a heartbeat a second. One that was not heard of for `silence` seconds, whose connection ended before
it took leave, or that says that it failed, is lost; the leader tells all others, so that every survivor names the same
process. A process that lives but does not get on is found by its heartbeat, which says how far it is.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from jaxinfer.communication.connection import Connection, ConnectionLostError, Message
from jaxinfer.communication.progress import Patience, Progress
from jaxinfer.errors import EngineClosedError, ProcessLostError

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 1.0
_BLAME_SECONDS = 2.0
"""How long a process whose own step failed waits to hear that another process is the reason."""
_TELL_SECONDS = 1.0
_START_SECONDS = 300.0
"""How long a process may be silent until all have started: starting JAX may keep all threads of a process waiting."""


class Kind(enum.IntEnum):
    """The kinds of messages; each says who sends it to whom, and what it means."""

    HEARTBEAT = 0
    """Both ways, once a second: how far this process is (Progress)."""
    FAILED = 1
    """Follower to leader: this process failed, for the reason in the payload."""
    ABORT = 2
    """Leader to follower: the run has failed, for the reason in the payload."""
    LEAVE = 3
    """Follower to leader: this process ends as it should. Leader to follower: all processes do, and may."""
    VALUE = 4
    """Follower to leader: its value in a gathering."""
    VALUES = 5
    """Leader to follower: the values of all processes of the gathering."""
    TERMINATE = 6
    """Follower to leader: this process was asked to end, and so the run should."""
    END = 7
    """Leader to follower: the run ends in good order."""
    STEP = 8
    """Leader to follower: launch this step."""
    DIGEST = 9
    """Follower to leader: a digest of the tokens that the step sampled here."""
    WARM_UP = 10
    """Leader to follower: compile all programs of a model."""
    CLOSE = 11
    """Leader to follower: close an engine."""
    OPEN = 12
    """Leader to follower: load this model with these settings."""
    CALL = 13
    """Follower to leader: this process makes a call, whose arguments have this digest."""
    FOLLOW = 14
    """Follower to leader: this process makes no calls of its own any more."""
    RESULT = 15
    """Leader to follower: the result of a call."""
    LEAVING = 16
    """Leader to follower: the leader ends as it should, once all others do."""
    TOKENS = 17
    """Follower to leader: what a step has sampled, for a leader that has no part of the model."""
    WARM = 18
    """Follower to such a leader: the programs of a model are compiled that WARM_UP asked for."""


@runtime_checkable
class Endable(Protocol):
    """Something that has to be closed before its process takes leave of the run."""

    def drain(self, seconds: float) -> None:
        """Takes no new work and waits until the present one is done, at most for so many seconds."""
        ...

    def close(self) -> None:
        """Ends what still runs and frees what it holds."""
        ...


@dataclass(eq=False, slots=True)
class _Peer:
    """Another process, as this one sees it."""

    process_id: int
    connection: Connection
    last_heard: float = field(default_factory=time.monotonic)
    has_left: bool = False
    progress: Progress = field(default_factory=Progress)


class Members(NamedTuple):
    """Some processes of a run that do something together.

    Args:
      ids: their numbers, ascending.
      task: tells apart what the same processes do together; each task has gatherings of its own.
    """

    ids: tuple[int, ...]
    task: int = -1


class GatherError(RuntimeError):
    """Processes did not agree, or one of them failed; the run goes on.

    Args:
      text: what went wrong.
      members: the processes that took part in the gathering and get this error.
    """

    def __init__(self, text: str, members: Members | None = None):
        super().__init__(text)
        self.members = members


Entry = Mapping[str, str | None]
"""What a process gives to a gathering: topic, value and error."""
Gathering = tuple[Members, int]
"""The processes that take part in a gathering, and its number among their gatherings."""
Handler = Callable[[int, Message], None]
"""Gets the number of the process that sent a message, and the message. It runs on the thread that listens to that
process, so it must not wait for anything that this process sends."""


class ProcessGroup(ABC):
    """All processes of a run, as one of them sees them: the leader its followers, a follower the leader.

    Args:
      process_id, num_processes: as Membership's.
      connections: to the other side, by process.
      patience: how long to wait for others.
      on_lost: called once, on any thread, when the run has failed; it has to end the process.
    """

    def __init__(
        self,
        process_id: int,
        num_processes: int,
        connections: Mapping[int, Connection],
        *,
        patience: Patience,
        on_lost: Callable[[ProcessLostError], None],
    ):
        self.process_id = process_id
        self.num_processes = num_processes
        self.everyone = Members(tuple(range(num_processes)))
        """All processes."""
        self.patience = patience
        self._on_lost = on_lost
        self._peers = [_Peer(number, connection) for number, connection in connections.items()]
        self._changed = threading.Condition()
        self._error: ProcessLostError | None = None
        self._has_left = False
        self._handlers: dict[int, Handler] = {Kind.HEARTBEAT: self._hear_heartbeat, Kind.LEAVE: self._hear_leave}
        self._progress: Callable[[], Progress] = Progress
        self._listeners: weakref.WeakSet[_LossListener] = weakref.WeakSet()
        self._engines: weakref.WeakSet[Endable] = weakref.WeakSet()
        self._num_gathered: Counter[Members] = Counter()
        self._given: dict[Gathering, dict[int, Entry]] = {}  # on the leader: by process, until all have given theirs
        self._gathered: dict[Gathering, list[Entry]] = {}
        self._silence = max(patience.silence, _START_SECONDS)
        self._telling: list[threading.Thread] = []
        self._is_written = threading.Event()

    def start(self) -> None:
        """Starts to listen and to send heartbeats; whoever handles messages has to be registered before."""
        for peer in self._peers:
            peer.last_heard = time.monotonic()
            for work in (self._listen, self._beat):
                name = f"jaxinfer-process-{peer.process_id}"
                threading.Thread(target=work, args=(peer,), name=name, daemon=True).start()
        threading.Thread(target=self._watch, name="jaxinfer-watch", daemon=True).start()

    def settle(self) -> None:
        """Waits until all processes have started whatever may keep their threads from running, such as JAX.

        From then on, a process that is silent for `Patience.silence` seconds is lost.
        """
        self.gather("starting")
        for peer in self._peers:
            peer.last_heard = time.monotonic()
        self._silence = self.patience.silence

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0."""
        return self.process_id == 0

    @property
    def error(self) -> ProcessLostError | None:
        """Why the run has failed; None while it has not."""
        return self._error

    def handle(self, kind: Kind, handler: Handler) -> None:
        """Names the function that gets the messages of a kind."""
        self._handlers[kind] = handler

    def report_progress(self, progress: Callable[[], Progress]) -> None:
        """Names the function that says how far this process is."""
        self._progress = progress

    def attach(self, engine: Endable) -> None:
        """Lets the run close an engine before it ends; engines that are garbage are forgotten."""
        self._engines.add(engine)

    @property
    def engines(self) -> list[Endable]:
        """The engines that are attached."""
        return list(self._engines)

    def when_lost(self, listener: _LossListener) -> None:
        """Lets a listener know when the run fails, at once if it has failed already. It is held weakly."""
        with self._changed:
            self._listeners.add(listener)
            error = self._error
        if error is not None:
            listener.lose(error)

    def send(self, message: Message) -> None:
        """Sends a message to the other side: the leader to all followers, a follower to the leader.

        Raises:
          ProcessLostError: the run has failed; it fails if a process cannot be reached.
        """
        for peer in self._peers:
            self._send_to(peer, message)

    def _send_to(self, peer: _Peer, message: Message) -> None:
        if self._error is not None:
            raise self._error
        try:
            peer.connection.send(message)
        except ConnectionLostError as error:
            if not peer.has_left:
                raise self._lose(self._lost_text(peer, str(error))) from error

    def wait_for(self, condition: Callable[[], bool], what: str = "") -> None:
        """Waits until a condition holds; whoever makes it true does so inside `with change()`.

        Args:
          condition: the condition; it is called with the group's lock held.
          what: named in the log if it takes over 30 seconds; "" logs nothing.

        Raises:
          ProcessLostError: the run has failed.
        """
        noted = time.monotonic() + 30.0
        with self._changed:
            while not condition():
                if self._error is not None:
                    raise self._error
                self._changed.wait(1.0)
                if what and time.monotonic() > noted:
                    noted += 300.0
                    logger.warning("process %d waits for %s", self.process_id, what)

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Holds the group's lock while something changes that wait_for waits for, and wakes the waiting threads."""
        with self._changed:
            yield
            self._changed.notify_all()

    def gather(
        self, topic: str, value: str = "", *, error: str | None = None, among: Members | None = None
    ) -> list[str]:
        """Exchanges a value with other processes, each of which has to call this.

        Args:
          topic: what the value is; all processes have to name the same.
          value: this process's value.
          error: what went wrong on this process, in place of a value.
          among: the processes that exchange values; None is all of them. The leader may call this without being one of
            them, and learns the values of the others.

        Returns:
          Their values, in the order of the processes.

        Raises:
          GatherError: a process has given an error, or processes have named different topics.
          ProcessLostError: the run has failed.
        """
        members = among or self.everyone
        gathering = members, self._num_gathered[members]
        self._num_gathered[members] += 1
        is_member = self.process_id in members.ids
        self._enter(gathering, {"topic": topic, "value": value, "error": error} if is_member else None)
        others = ", ".join(str(process_id) for process_id in members.ids if process_id != self.process_id)
        self.wait_for(lambda: gathering in self._gathered, f"process {others} ({topic})")
        return _values(members, self._gathered.pop(gathering))

    def forget(self, task: int) -> None:
        """Drops what is left of a task's gatherings, of which there will be no more."""
        with self.change():
            for kept in (self._gathered, self._given):
                for gathering in [gathering for gathering in kept if gathering[0].task == task]:
                    del kept[gathering]
            for members in [members for members in self._num_gathered if members.task == task]:
                del self._num_gathered[members]

    @abstractmethod
    def _enter(self, gathering: Gathering, entry: Entry | None) -> None:
        """Adds this process's entry to a gathering; None if it only wants to learn the others' values."""

    def agree(self, topic: str, value: str) -> None:
        """Makes sure that a value is the same on all processes, each of which has to call this.

        Raises:
          GatherError: it is not; the message names the processes that differ from process 0, and both values.
        """
        values = self.gather(topic, value)
        others = [number for number, other in enumerate(values) if other != values[0]]
        if others:
            raise GatherError(
                f"{topic} must be the same on all processes: process 0 has {values[0]}, process {others[0]} has "
                f"{values[others[0]]}" + (f" (and {len(others) - 1} more differ)" if len(others) > 1 else ""),
                self.everyone,
            )

    @contextlib.contextmanager
    def together(self, topic: str, *, among: Members | None = None) -> Iterator[None]:
        """A block that processes go through together; if it raises on one of them, it raises on all.

        Args:
          topic: what the block does.
          among: as gather's.

        Raises:
          GatherError: it raised on another process; the message names it.
        """
        members = among or self.everyone
        try:
            yield
        except ProcessLostError:
            raise  # the others know
        except BaseException as error:
            is_known = isinstance(error, GatherError) and error.members == members
            if not is_known and self.process_id in members.ids:
                text = str(error) if isinstance(error, GatherError) else f"{type(error).__name__}: {error}"
                with contextlib.suppress(GatherError):
                    self.gather(topic, error=text, among=members)
            raise
        self.gather(topic, among=members)

    def fail(self, reason: BaseException) -> ProcessLostError:
        """Ends the run because this process cannot go on; if another process is the reason, that one is named.

        Returns:
          The error that every thread of this process gets.
        """
        # That an engine was closed is no first reason: whoever closed it may have failed, and waits here as well.
        patience = 2 if isinstance(reason, EngineClosedError) else 1
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, patience * _BLAME_SECONDS)
        return self._error or self._lose(
            f"process {self.process_id} of {self.num_processes} failed: {type(reason).__name__}: {reason}"
        )

    def diverge(self, text: str) -> ProcessLostError:
        """Ends the run because processes have computed different things."""
        return self._lose(text)

    def leave(self) -> None:
        """Takes leave of the run: returns once all processes have, so that none waits for another in vain.

        Raises:
          ProcessLostError: the run has failed.
        """
        if not self._has_left:
            self._take_leave()
            self._has_left = True
            self._close()

    @abstractmethod
    def _take_leave(self) -> None: ...

    def _close(self) -> None:
        for peer in self._peers:
            peer.has_left = True
            peer.connection.close()

    def _listen(self, peer: _Peer) -> None:
        try:
            while True:
                message = peer.connection.receive()
                peer.last_heard = time.monotonic()
                handler = self._handlers.get(message.kind)
                if handler is None:
                    raise ConnectionLostError(f"it sent a message of unknown kind {message.kind}")
                handler(peer.process_id, message)
        except (ConnectionLostError, TimeoutError) as error:
            if not peer.has_left:
                self._lose(self._lost_text(peer, str(error)))
        except ProcessLostError:
            return
        except Exception as error:  # a handler failed: this process cannot go on
            self._lose(f"process {self.process_id} failed: {type(error).__name__}: {error}")

    def _beat(self, peer: _Peer) -> None:
        # A thread for every peer, since one that has stopped reading must not keep heartbeats from the others.
        while not peer.has_left and self._error is None:
            try:
                peer.connection.send(Message(Kind.HEARTBEAT, payload=self._progress().pack()))
            except ConnectionLostError:
                return  # the thread that listens will say so
            time.sleep(_HEARTBEAT_SECONDS)

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._has_left and self._error is None:
            time.sleep(_HEARTBEAT_SECONDS)
            late = time.monotonic() - woken - _HEARTBEAT_SECONDS
            woken += _HEARTBEAT_SECONDS + late
            if late > _HEARTBEAT_SECONDS:  # this process itself was held up, and may not have heard what was sent
                for peer in self._peers:
                    peer.last_heard += late
            for peer in self._peers:
                if not peer.has_left and woken - peer.last_heard > self._silence:
                    self._lose(self._lost_text(peer, f"nothing was heard of it for {self._silence:g} s"))
            self._watch_steps()

    def _watch_steps(self) -> None:
        """Looks for processes that live but do not get on; only the leader can tell."""

    def _lost_text(self, peer: _Peer, reason: str) -> str:
        return f"process {peer.process_id} of {self.num_processes} was lost: {reason}"

    def _lose(self, text: str) -> ProcessLostError:
        """Notes that the run has failed and tells everybody, once."""
        with self._changed:
            if self._error is not None:
                return self._error
            self._error = error = ProcessLostError(text)
            self._tell_lost(text)
            listeners = list(self._listeners)
            self._changed.notify_all()
        os.write(2, f"jaxinfer: {text}\n".encode())  # even where the log is off, or another thread holds its lock
        self._is_written.set()
        for listener in listeners:
            listener.lose(error)
        self._on_lost(error)
        return error

    def _tell_lost(self, text: str) -> None:
        message = Message(Kind.ABORT if self.is_leader else Kind.FAILED, payload=text.encode())
        for peer in self._peers:
            # In a thread each: the connection to a process that has stopped reading may be full.
            self._telling.append(threading.Thread(target=_try_to_send, args=(peer.connection, message), daemon=True))
            self._telling[-1].start()

    def finish_telling(self) -> None:
        """Waits until the user and the other processes have been told that the run has failed, a second at most."""
        deadline = time.monotonic() + _TELL_SECONDS
        self._is_written.wait(_TELL_SECONDS)
        for thread in self._telling:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _hear_heartbeat(self, process_id: int, message: Message) -> None:
        self._peer(process_id).progress = Progress.unpack(message.payload)

    def _hear_leave(self, process_id: int, message: Message) -> None:
        with self.change():
            self._peer(process_id).has_left = True

    def _peer(self, process_id: int) -> _Peer:
        return next(peer for peer in self._peers if peer.process_id == process_id)


class _LossListener(Protocol):
    def lose(self, error: ProcessLostError) -> None:
        """Takes note that the run has failed; called once, on any thread."""
        ...


def _values(members: Members, entries: Sequence[Entry]) -> list[str]:
    for number, entry in zip(members.ids, entries, strict=True):
        if entry["error"] is not None:
            raise GatherError(f"process {number} failed ({entry['topic']}): {entry['error']}", members)
    topics = [entry["topic"] for entry in entries]
    for number, topic in zip(members.ids, topics, strict=True):
        if topic != topics[0]:
            raise GatherError(
                f"processes do different things: process {members.ids[0]} is at {topics[0]!r}, process {number} at "
                f"{topic!r}; run the same script on all of them",
                members,
            )
    return [entry["value"] or "" for entry in entries]


def _try_to_send(connection: Connection, message: Message) -> None:
    with contextlib.suppress(ConnectionLostError):
        connection.send(message)
