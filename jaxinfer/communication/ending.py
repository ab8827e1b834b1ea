"""How a process of a run ends: with the others when all is well, and soon after them when one is lost.

Owns: what happens at the interpreter's exit, after an uncaught exception and on SIGTERM, and exit codes.
Does not know: jax, what the processes compute.

jax.distributed lets every process wait at its exit until all have come there, so a survivor would wait for a lost
process. It therefore ends without that exit, by os._exit, after its threads had `Patience.grace` seconds to raise.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from jaxinfer.communication.connection import Message
from jaxinfer.communication.process_group import Kind, ProcessGroup
from jaxinfer.errors import ProcessLostError

EXIT_LOST = 75
"""Exit code of a survivor, EX_TEMPFAIL: it did nothing wrong, and the same run may succeed another time."""
EXIT_FAILED = 1


class ProcessEnd:
    """Lets this process end with its run.

    SIGTERM on any process ends the run in good order: running requests are completed (for `Patience.drain` seconds at
    most), then every process raises SystemExit(0) in its main thread. If the program has its own handler of SIGTERM
    already, that one stays.

    Args:
      group: the run's processes, not started yet.
    """

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._is_wanted = threading.Event()
        self._is_due = False
        self._has_failed = False
        self._handles_signal = False
        group.handle(Kind.TERMINATE, lambda *_: self._is_wanted.set())
        group.handle(Kind.END, lambda *_: self._interrupt())

    def install(self) -> None:
        """Registers what happens at exit, on an uncaught exception and on SIGTERM; called in the main thread."""
        atexit.register(self._at_exit)
        sys.excepthook = self._after(sys.excepthook)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) in (
            signal.SIG_DFL,
            None,  # a handler that is not Python's: that of JAX's preemption service
        ):
            signal.signal(signal.SIGTERM, self._on_signal)
            self._handles_signal = True
        threading.Thread(target=self._end_when_wanted, name="jaxinfer-end", daemon=True).start()

    @property
    def is_due(self) -> bool:
        """Whether the run ends now, and the main thread with it."""
        return self._is_due or self._is_wanted.is_set()

    def hold(self) -> None:
        """Lets the main thread wait for its end if the run is ending, instead of raising errors about that."""
        deadline = time.monotonic() + 2 * self._group.patience.drain
        while self.is_due and self._handles_signal and time.monotonic() < deadline:
            if threading.current_thread() is not threading.main_thread():
                return
            time.sleep(0.1)

    def _at_exit(self) -> None:
        if self._handles_signal:  # the process ends already, and taking leave must not be interrupted
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._has_failed or self._group.error is not None:
            self._group.finish_telling()
            exit_now(EXIT_FAILED if self._has_failed else EXIT_LOST)
        try:
            for engine in self._group.engines:
                engine.close()
            self._group.leave()
        except ProcessLostError:
            self._group.finish_telling()
            exit_now(EXIT_LOST)

    def _after(self, hook: Callable[..., Any]) -> Callable[..., None]:
        def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
            hook(kind, error, traceback)
            if not isinstance(error, (KeyboardInterrupt, ProcessLostError)):
                self._has_failed = True
                self._group.fail(error)

        return excepthook

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_due:
            raise SystemExit(0)
        self._is_wanted.set()

    def _end_when_wanted(self) -> None:
        self._is_wanted.wait()
        with contextlib.suppress(ProcessLostError):
            if not self._group.is_leader:
                self._group.send(Message(Kind.TERMINATE))
                return  # the leader answers with Kind.END
            deadline = time.monotonic() + self._group.patience.drain
            for engine in self._group.engines:
                engine.drain(max(deadline - time.monotonic(), 0.0))
            self._group.send(Message(Kind.END))
            self._interrupt()

    def _interrupt(self) -> None:
        """Raises SystemExit in the main thread; if that does not end it, the process ends after a while."""
        if self._handles_signal and not self._is_due:
            self._is_due = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            end_later(self._group.patience.drain, 0)


def end_later(seconds: float, code: int) -> None:
    """Ends this process after a while, if it has not ended by then."""
    timer = threading.Timer(seconds, exit_now, (code,))
    timer.daemon = True
    timer.start()


def exit_now(code: int) -> NoReturn:
    """Ends this process at once: what was printed is written, but no handler of its exit runs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
