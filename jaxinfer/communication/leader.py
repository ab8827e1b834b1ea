"""The processes of a run as process 0 sees them.

Owns: sending to all or some followers, completing gatherings, acting on processes that are stuck.
Does not know: jax, what the processes compute.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxinfer.communication.connection import Connection, Message
from jaxinfer.communication.process_group import Entry, Gathering, Kind, Members, ProcessGroup
from jaxinfer.communication.progress import Patience, Progress
from jaxinfer.errors import ProcessLostError


class Leader(ProcessGroup):
    """The processes of a run as process 0 sees them; arguments as ProcessGroup's.

    Args:
      connections: to every follower.
    """

    def __init__(
        self,
        connections: Mapping[int, Connection],
        *,
        patience: Patience,
        on_lost: Callable[[ProcessLostError], None],
    ):
        super().__init__(0, len(connections) + 1, connections, patience=patience, on_lost=on_lost)
        self._failed: dict[int, tuple[Gathering, Entry]] = {}  # by process, until all have learned of its error
        self._handlers |= {Kind.FAILED: self._hear_failed, Kind.VALUE: self._hear_value}
        self._launching = {process_id: threading.Lock() for process_id in self.everyone.ids}
        self._find_stuck: Callable[[], Sequence[int]] = tuple

    @contextlib.contextmanager
    def launching(self, process_ids: Sequence[int]) -> Iterator[None]:
        """Held while a step is sent to some processes and launched here, so that all of them launch in one order."""
        with contextlib.ExitStack() as stack:
            for process_id in sorted(process_ids):
                stack.enter_context(self._launching[process_id])
            yield

    def send_to(self, process_ids: Sequence[int], message: Message) -> None:
        """Sends a message to some processes; see send. This process itself may be among them and gets none.

        Raises:
          ProcessLostError: the run has failed; it fails if a process cannot be reached.
        """
        for peer in self._peers:
            if peer.process_id in process_ids:
                self._send_to(peer, message)

    def progress_of(self, process_id: int) -> Progress:
        """How far another process is."""
        return self._peer(process_id).progress

    def watch(self, find_stuck: Callable[[], Sequence[int]]) -> None:
        """Names the function that finds processes that are stuck; it is called once a second."""
        self._find_stuck = find_stuck

    def _enter(self, gathering: Gathering, entry: Entry | None) -> None:
        self._take(gathering, 0, entry)

    def _take(self, gathering: Gathering, process_id: int, entry: Entry | None) -> None:
        """Takes a process's entry to a gathering; the last one completes it, whatever this process is at.

        A process that has reported an error to everyone comes to no smaller gathering any more, until everyone has
        learned of the error; there, the error counts as its entry.
        """
        complete: list[tuple[Gathering, list[Entry]]] = []
        with self.change():
            if gathering in self._gathered:
                return  # this process only wants to learn the others' values, which are all there
            given = self._given.setdefault(gathering, {})
            if entry is not None:
                given[process_id] = entry
            if gathering[0] == self.everyone and entry is not None and entry["error"] is not None:
                self._failed[process_id] = gathering, entry
            for found, given in list(self._given.items()):
                process_ids = found[0].ids
                if found[0] != self.everyone:
                    for other in set(process_ids) & set(self._failed):
                        given.setdefault(other, self._failed[other][1])
                if len(given) == len(process_ids):
                    complete.append((found, [given[other] for other in process_ids]))
            for found, entries in complete:
                del self._given[found]
                self._gathered[found] = entries
                self._failed = {other: failure for other, failure in self._failed.items() if failure[0] != found}
        for (members, number), entries in complete:
            self.send_to(members.ids, Message(Kind.VALUES, number, json.dumps([members, entries]).encode()))

    def has_left(self, process_id: int) -> bool:
        """Whether a follower has taken leave."""
        return self._peer(process_id).has_left

    def _take_leave(self) -> None:
        peers = self._peers
        self.send(Message(Kind.LEAVING))
        self.wait_for(lambda: all(peer.has_left for peer in peers), "the other processes to end")
        self.send(Message(Kind.LEAVE))

    def _hear_failed(self, process_id: int, message: Message) -> None:
        self._lose(message.payload.decode(errors="replace"))

    def _hear_value(self, process_id: int, message: Message) -> None:
        (process_ids, task), entry = json.loads(message.payload)
        self._take((Members(tuple(process_ids), task), message.number), process_id, entry)

    def _watch_steps(self) -> None:
        found = self._find_stuck()
        if found:
            names = ", ".join(map(str, found))
            self._lose(
                f"process {names} of {self.num_processes} is stuck: a step did not end within {self.patience.step:g} s"
            )
