"""A cache of programs that are compiled ahead of time, by name and arguments.

Owns: lowering, compiling each program once even if several threads ask for it, compiling in the background, and the
count of compilations.
Does not know: what the programs compute.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

logger = logging.getLogger(__name__)

ProgramKey = tuple[Any, ...]
"""A program's name, followed by its arguments."""


class ProgramCache:
    """Compiled programs by name and arguments; each is lowered and compiled once.

    Args:
      traces: for each name, a function that traces the program for given arguments.
      options: for some names, a function that returns XLA's options for the program with these arguments.
      tuned_alike: for some names, a function that names the matrix products of the program with these arguments. XLA
        tunes products on the device while it compiles, and remembers what it found; of programs with the same products,
        a first one is therefore compiled alone. Empty where XLA does not tune.
      in_order: compile one program after the other. Processes that share a mesh tune their programs together, so all
        of them have to compile in one order.
    """

    def __init__(
        self,
        traces: Mapping[str, Callable[..., jax.stages.Traced]],
        options: Mapping[str, Callable[..., dict[str, bool | str]]],
        tuned_alike: Mapping[str, Callable[..., Hashable]] | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        self._num_threads = 1 if in_order else os.cpu_count()
        self._traces = traces
        self._options = options
        self._tuned_alike = tuned_alike or {}
        self._programs: dict[ProgramKey, jax.stages.Compiled] = {}
        self._num_compilations = self._num_being_compiled = 0
        self._turns: dict[ProgramKey, threading.Lock] = {}  # held while the program is compiled
        self._tuning: dict[Hashable, threading.Lock] = {}  # held while the first of its kind is compiled
        self._tuned: set[Hashable] = set()
        self._lock = threading.Lock()
        self._waiting: deque[ProgramKey] = deque()  # to be compiled in the background
        self._unfinished: set[ProgramKey] = set()  # of compile_in_background
        self._workers: list[threading.Thread] = []
        self._asked: set[ProgramKey] = set()  # by compile_next
        self._is_closed = False

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return self._num_compilations

    @property
    def is_compiling(self) -> bool:
        """Whether a program is being compiled now."""
        return self._num_being_compiled > 0

    def get(self, name: str, *arguments: Hashable) -> jax.stages.Compiled:
        """A program, compiled on the first call.

        Threads that ask for it meanwhile wait; if the compilation fails, the next one tries again.
        """
        key = (name, *arguments)
        program = self._programs.get(key)
        return self._compile_once(key) if program is None else program

    def _compile_once(self, key: ProgramKey) -> jax.stages.Compiled:
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            program = self._programs.get(key)
            if program is None:
                with self._tuned_once(key):
                    program = self._compile(*key)
                with self._lock:
                    if not self._is_closed:
                        self._programs[key] = program
                    self._num_compilations += 1
        return program

    @contextmanager
    def _tuned_once(self, key: ProgramKey) -> Iterator[None]:
        """Lets a program be compiled alone if no other one with its matrix products has been compiled yet."""
        kind = self._kind(key)
        with self._lock:
            tuning = self._tuning.setdefault(kind, threading.Lock())
        if kind is None or kind in self._tuned:
            yield
            return
        with tuning:
            yield
            self._tuned.add(kind)

    def _kind(self, key: ProgramKey) -> Hashable:
        name, *arguments = key
        return self._tuned_alike[name](*arguments) if name in self._tuned_alike else None

    def _compile(self, name: str, *arguments: Hashable) -> jax.stages.Compiled:
        options = self._options[name](*arguments) if name in self._options else {}
        with self._lock:
            self._num_being_compiled += 1
        try:
            return self._traces[name](*arguments).lower().compile(compiler_options=options or None)
        finally:
            with self._lock:
                self._num_being_compiled -= 1

    def compile_all(self, wanted: Sequence[ProgramKey]) -> None:
        """Compiles programs, in as many threads as there are cores unless they have to be compiled in order.

        XLA compiles in parallel; tracing stays serial.
        """
        with ThreadPoolExecutor(max_workers=self._num_threads) as pool:
            list(pool.map(lambda entry: self.get(*entry), self._one_of_each_kind_first(wanted)))

    def _one_of_each_kind_first(self, wanted: Iterable[ProgramKey]) -> list[ProgramKey]:
        """The programs in an order in which threads rarely wait for one another's tuning."""
        kinds: set[Hashable] = {None}
        first: list[ProgramKey] = []
        others: list[ProgramKey] = []
        for key in wanted:
            kind = self._kind(key)
            (others if kind in kinds else first).append(key)
            kinds.add(kind)
        return first + others

    def compile_in_background(self, wanted: Sequence[ProgramKey]) -> None:
        """Starts to compile programs in threads of their own, half as many as there are cores.

        Programs that are asked for by `first_ready` meanwhile come first.
        """
        with self._lock:
            self._unfinished.update(wanted)
            self._waiting.extend(self._one_of_each_kind_first(wanted))
            self._start_workers()

    @property
    def may_compile_beside(self) -> bool:
        """Whether a program may be compiled in the background beside another one that is needed at once.

        Not on a single core, nor where programs have to be compiled in order. Nor while the background compiles all
        programs anyway.
        """
        return self._num_threads != 1 and self.is_complete

    @property
    def may_work_ahead(self) -> bool:
        """Whether programs that are probably needed soon may be compiled in the background, beside steps as well.

        Not where XLA tunes them on the device that runs the steps.
        """
        return self.may_compile_beside and not self._tuned_alike

    def compile_next(self, *keys: ProgramKey) -> None:
        """Begins to compile programs in the background, before all that wait there; returns at once.

        A program that was asked for before is not tried again, even if it could not be compiled.
        """
        with self._lock:
            new = [key for key in keys if key not in self._asked and key not in self._turns]
            if self._is_closed or not new:
                return
            self._asked.update(new)
            self._waiting = deque(dict.fromkeys([*new, *self._waiting]))
            self._start_workers()

    def _start_workers(self) -> None:
        """Starts threads for the programs that wait; the caller holds the lock."""
        num_missing = max(1, (os.cpu_count() or 1) // 2) - len(self._workers)  # each one is busy
        for _ in range(min(len(self._waiting), num_missing)):
            atexit.register(self._end_background)
            worker = threading.Thread(target=self._work, name="jaxinfer-compiler", daemon=True)
            self._workers.append(worker)
            worker.start()

    @property
    def is_complete(self) -> bool:
        """Whether compile_in_background has nothing to do, or is done."""
        return not self._unfinished

    def wait(self) -> None:
        """Waits until the background has compiled everything."""
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.join()

    def first_ready(self, options: Sequence[ProgramKey]) -> ProgramKey:
        """The first of these programs that is compiled, or the first of all if none is.

        If it is not the first and that one is waiting for the background, it will be the next to be compiled.
        """
        wanted = options[0]
        if wanted in self._programs:
            return wanted
        with self._lock:
            if wanted in self._waiting:
                self._waiting.remove(wanted)
                self._waiting.appendleft(wanted)
        return next((key for key in options if key in self._programs), wanted)

    def are_ready(self, keys: Iterable[ProgramKey]) -> bool:
        """Whether all of these programs are compiled."""
        return all(key in self._programs for key in keys)

    def forget(self, is_obsolete: Callable[[ProgramKey], bool]) -> None:
        """Drops the compiled programs whose keys a function says are obsolete."""
        with self._lock:
            for key in [key for key in self._programs if is_obsolete(key)]:
                del self._programs[key]
                self._turns.pop(key, None)

    def _work(self) -> None:
        while (key := self._next_waiting()) is not None:
            self._try(key)
            with self._lock:
                self._unfinished.discard(key)

    def _next_waiting(self) -> ProgramKey | None:
        """The next program for a worker; None, after which it must end, if none waits."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._workers.remove(threading.current_thread())
            if self._is_closed and not self._workers:
                atexit.unregister(self._end_background)
            return None

    def _try(self, key: ProgramKey) -> None:
        try:
            self.get(*key)
        except Exception:  # whoever needs the program will compile it then, and raise what is wrong
            logger.warning("program %s could not be compiled in the background", key, exc_info=True)

    def _end_background(self) -> None:
        """Compiles nothing more in the background; waits for what is being compiled."""
        self._close()
        self.wait()

    def clear(self) -> None:
        """Drops all programs, and those that wait to be compiled; the cache keeps none from then on."""
        self._close()
        with self._lock:
            self._programs.clear()
            if not self._workers:  # else the end of the process has to wait for XLA
                atexit.unregister(self._end_background)

    def _close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._waiting.clear()
            self._unfinished.clear()
