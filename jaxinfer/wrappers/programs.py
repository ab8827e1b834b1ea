"""A cache of programs that are compiled ahead of time, by name and arguments.

Owns: lowering, compiling each program once even if several threads ask for it, and the count of compilations.
Does not know: what the programs compute.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class ProgramCache:
    """Compiled programs by name and arguments; each is lowered and compiled once.

    Args:
      traces: for each name, a function that traces the program for given arguments.
      options: for some names, a function that returns XLA's options for the program with these arguments.
    """

    def __init__(
        self,
        traces: Mapping[str, Callable[..., jax.stages.Traced]],
        options: Mapping[str, Callable[..., dict[str, str | bool]]],
    ) -> None:
        self._traces = traces
        self._options = options
        self._programs: dict[tuple[Any, ...], jax.stages.Compiled] = {}
        self._num_compilations = 0
        self._turns: dict[tuple[Any, ...], threading.Lock] = {}  # held while the program is compiled
        self._lock = threading.Lock()

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return self._num_compilations

    def get(self, name: str, *arguments: Hashable) -> jax.stages.Compiled:
        """A program, compiled on the first call.

        Threads that ask for it meanwhile wait; if the compilation fails, the next one tries again.
        """
        key = (name, *arguments)
        program = self._programs.get(key)
        return self._compile_once(key) if program is None else program

    def _compile_once(self, key: tuple[Any, ...]) -> jax.stages.Compiled:
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            program = self._programs.get(key)
            if program is None:
                program = self._compile(*key)
                with self._lock:
                    self._programs[key] = program
                    self._num_compilations += 1
        return program

    def _compile(self, name: str, *arguments: Hashable) -> jax.stages.Compiled:
        options = self._options[name](*arguments) if name in self._options else {}
        return self._traces[name](*arguments).lower().compile(compiler_options=options or None)

    def compile_all(self, wanted: Iterable[tuple[Hashable, ...]]) -> None:
        """Compiles the programs given as (name, *arguments), in as many threads as there are cores.

        XLA compiles in parallel; tracing stays serial.
        """
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda entry: self.get(*entry), wanted))

    def clear(self) -> None:
        """Drops all programs."""
        self._programs.clear()
