"""How far each process of a run is, how long others wait for it, and which one they wait for in vain.

Owns: Patience, Progress and its form in a heartbeat, and the rule that finds a process that is stuck.
Does not know: sockets, threads.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxinfer.communication.connection import ConnectionLostError
from jaxinfer.communication.model_key import ModelKey

_COMPILING = struct.Struct("<?")
_MODEL = struct.Struct("<HHHQd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to wait for other processes, in seconds.

    Args:
      rendezvous: until all processes of the run have connected.
      silence: until a process that is not heard of counts as lost.
      step: until a step that has not ended on some process counts as stuck, since a process has last compiled.
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
class ModelProgress:
    """How far a process is with the steps of a model.

    Args:
      num_launched: steps launched so far.
      waiting_seconds: for how long it has been launching a step, or waiting for one to end; 0 if it does neither.
    """

    num_launched: int = 0
    waiting_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a process is, as its heartbeat says.

    Args:
      is_compiling: whether it compiles, which may take long.
      models: how far it is with each model of which it holds a part, or that it leads.
    """

    is_compiling: bool = False
    models: Mapping[ModelKey, ModelProgress] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The payload of a heartbeat."""
        entries = (_MODEL.pack(*key, model.num_launched, model.waiting_seconds) for key, model in self.models.items())
        return _COMPILING.pack(self.is_compiling) + b"".join(entries)

    @classmethod
    def unpack(cls, payload: bytes) -> Progress:
        """Reads the payload of a heartbeat.

        Raises:
          ConnectionLostError: it is none.
        """
        if len(payload) % _MODEL.size != _COMPILING.size:
            raise ConnectionLostError("received a heartbeat of a wrong size")
        models = {
            ModelKey(*key): ModelProgress(num_launched=num_launched, waiting_seconds=waiting_seconds)
            for *key, num_launched, waiting_seconds in _MODEL.iter_unpack(payload[_COMPILING.size :])
        }
        return cls(is_compiling=_COMPILING.unpack_from(payload)[0], models=models)


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """A model as the leader sees it.

    Args:
      holders: the processes that hold it.
      num_sent: steps that the leader has sent to them.
      waiting_seconds: for how long the leader has been waiting for one; 0 if it is not.
    """

    holders: Sequence[int]
    num_sent: int
    waiting_seconds: float


def stuck(progress: Mapping[int, Progress], models: Mapping[ModelKey, Awaited], *, limit: float) -> list[int]:
    """The processes for which others wait in vain; none if nobody has waited too long.

    Args:
      progress: how far each process is.
      models: all models of the run.
      limit: seconds that a step may take while no process compiles that the step could wait for (is_compiling has to be
        true for so long after a compilation as well, if a step may wait for several).
    """
    late: dict[ModelKey, list[int]] = {}  # by model that somebody waits for: who waits
    behind: dict[ModelKey, list[int]] = {}  # and who has not even launched what the others wait for
    for key, model in models.items():
        reports = {number: progress[number].models.get(key, ModelProgress()) for number in model.holders}
        found = [number for number, report in reports.items() if report.waiting_seconds > limit]
        is_compiling = any(progress[number].is_compiling for number in _connected(model.holders, models))
        if (found or model.waiting_seconds > limit) and not is_compiling:
            least = min(report.num_launched for report in reports.values())
            late[key] = found or list(model.holders)
            behind[key] = [
                number for number, report in reports.items() if report.num_launched == least < model.num_sent
            ]
    # Whoever waits for another model's step may be behind for no other reason.
    reasons = [
        number
        for key, numbers in behind.items()
        for number in numbers
        if not any(number in late[other] for other in late if other != key)
    ]
    waiting = [number for key, numbers in late.items() if not behind[key] for number in numbers]
    return sorted({*(reasons or waiting or itertools.chain.from_iterable(behind.values()))})


def _connected(holders: Sequence[int], models: Mapping[ModelKey, Awaited]) -> set[int]:
    """The processes that hold a model or, from one model to the next, share a process with one that does."""
    found = set(holders)
    while (
        more := {number for model in models.values() if found & set(model.holders) for number in model.holders} - found
    ):
        found |= more
    return found
