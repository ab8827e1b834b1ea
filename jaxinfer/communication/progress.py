"""How far each process of a run is, how long others wait for it, and which one they wait for in vain.

Owns: Patience, Progress and its form in a heartbeat, and the rule that finds a process that is stuck.
Does not know: sockets, threads.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.communication.connection import ConnectionLostError

_PROGRESS = struct.Struct("<Qd?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to wait for other processes, in seconds.

    Args:
      rendezvous: until all processes of the run have connected.
      silence: until a process that is not heard of counts as lost.
      step: until a step that has not ended on some process counts as stuck, while no process compiles.
      drain: until running requests are cut off when the run is asked to end.
      grace: from the loss of a process until the survivors' interpreters end, in which their threads raise.
    """

    rendezvous: float = 600.0
    silence: float = 10.0
    step: float = 120.0
    drain: float = 30.0
    grace: float = 5.0

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if not getattr(self, entry.name) > 0:
                raise ValueError(f"{entry.name} must be > 0 seconds, got {getattr(self, entry.name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a process is, as its heartbeat says.

    Args:
      num_launched: steps launched so far.
      waiting_seconds: for how long it has been waiting for a step to end; 0 if it is not.
      is_compiling: whether it compiles or loads, which may take long.
    """

    num_launched: int = 0
    waiting_seconds: float = 0.0
    is_compiling: bool = False

    def pack(self) -> bytes:
        """The payload of a heartbeat."""
        return _PROGRESS.pack(self.num_launched, self.waiting_seconds, self.is_compiling)

    @classmethod
    def unpack(cls, payload: bytes) -> Progress:
        """Reads the payload of a heartbeat.

        Raises:
          ConnectionLostError: it is none.
        """
        if len(payload) != _PROGRESS.size:
            raise ConnectionLostError("received a heartbeat of a wrong size")
        num_launched, waiting_seconds, is_compiling = _PROGRESS.unpack(payload)
        return cls(num_launched=num_launched, waiting_seconds=waiting_seconds, is_compiling=is_compiling)


def stuck(
    progress: Mapping[int, Progress], *, num_sent: Mapping[int, int], waiting_seconds: float, limit: float
) -> list[int]:
    """The processes of those that hold a model for which all others wait in vain; none if nobody has waited too long.

    Args:
      progress: how far each of these processes is.
      num_sent: steps that the leader has sent to each.
      waiting_seconds: for how long the leader has been waiting for a step of this model.
      limit: seconds that a step may take while no process compiles.
    """
    late = [number for number, entry in progress.items() if entry.waiting_seconds > limit]
    if not (late or waiting_seconds > limit) or any(entry.is_compiling for entry in progress.values()):
        return []
    behind = {number: num_sent[number] - entry.num_launched for number, entry in progress.items()}
    most = max(behind.values())
    return [number for number, steps in behind.items() if steps == most > 0] or late or list(progress)
