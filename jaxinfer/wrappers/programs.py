"""Ahead-of-time compiled programs, held by key.

Owns: lowering, compiling once (several threads may ask), counting.
Does not know: what the programs compute.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax


class ProgramCache:
    """Compiled programs by key; each key is lowered and compiled once."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def get(self, key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The program of a key, compiled on the first call."""
        program = self._programs.get(key)
        if program is None:
            program = lower().compile()
            with self._lock:
                program = self._programs.setdefault(key, program)
        return program

    def compile_all(self, wanted: Iterable[tuple[Hashable, Callable[[], jax.stages.Lowered]]]) -> None:
        """Compiles many programs; XLA compiles in as many threads as there are cores, tracing is serial."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda entry: self.get(*entry), wanted))

    def clear(self) -> None:
        """Drops all programs."""
        self._programs.clear()
