"""The processes of a run as one that is not process 0 sees them: the leader is all that it talks to.

Owns: what the leader sends to the followers alone.
Does not know: jax, what the processes compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from jaxinfer.communication.connection import Connection, Message
from jaxinfer.communication.process_group import Entry, Gathering, Kind, Members, ProcessGroup
from jaxinfer.communication.progress import Patience
from jaxinfer.errors import ProcessLostError


class Follower(ProcessGroup):
    """The processes of a run as one of the others sees them; arguments as ProcessGroup's.

    Args:
      connection: to the leader.
    """

    def __init__(
        self,
        process_id: int,
        num_processes: int,
        connection: Connection,
        *,
        patience: Patience,
        on_lost: Callable[[ProcessLostError], None],
    ):
        super().__init__(process_id, num_processes, {0: connection}, patience=patience, on_lost=on_lost)
        self._is_leader_leaving = False
        self._handlers |= {
            Kind.ABORT: self._hear_abort,
            Kind.LEAVING: self._hear_leaving,
            Kind.VALUES: self._hear_values,
        }

    @property
    def is_leader_leaving(self) -> bool:
        """Whether process 0 is at its end, and sends no more work."""
        return self._is_leader_leaving

    def _enter(self, gathering: Gathering, entry: Entry | None) -> None:
        members, number = gathering
        self.send(Message(Kind.VALUE, number, json.dumps([members, entry]).encode()))

    def _take_leave(self) -> None:
        leader = self._peers[0]
        self.send(Message(Kind.LEAVE))
        self.wait_for(lambda: leader.has_left, "process 0 to end")

    def _hear_leaving(self, process_id: int, message: Message) -> None:
        with self.change():
            self._is_leader_leaving = True

    def _hear_abort(self, process_id: int, message: Message) -> None:
        self._lose(message.payload.decode(errors="replace"))

    def _hear_values(self, process_id: int, message: Message) -> None:
        (process_ids, task), entries = json.loads(message.payload)
        with self.change():
            self._gathered[Members(tuple(process_ids), task), message.number] = entries
