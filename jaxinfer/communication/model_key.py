"""ModelKey: which of a run's models a message is about.

Owns: the key and its form in messages.
Does not know: what models are.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_KEY = struct.Struct("<HHH")


class ModelKey(NamedTuple):
    """One of a run's models.

    Args:
      engine: number of the engine, in the order in which the run's engines were made.
      replica: number of the replica of the engine's models.
      model: 0 for the engine's model, 1 for its draft model.
    """

    engine: int
    replica: int
    model: int

    def pack(self) -> bytes:
        """The first bytes of a message about this model."""
        return _KEY.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> tuple[ModelKey, bytes]:
        """The model that a message is about, and the rest of the message."""
        return cls(*_KEY.unpack_from(payload)), payload[_KEY.size :]
