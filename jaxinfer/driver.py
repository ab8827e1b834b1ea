"""One thread that drives a controller, so that any number of threads (and Ctrl-C) can come and go around it.

Owns: the thread, the inbox of submissions and aborts, and the outboxes of answers.
Does not know: prompts' meaning, the engine, devices.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxinfer.outputs import RequestOutput
from jaxinfer.preparation import Submission


@runtime_checkable
class Drivable(Protocol):
    """What a driver asks of a controller; all but prepare run on the driver's thread."""

    def submit(self, submission: Submission) -> str:
        """Starts a prepared submission and returns its id."""
        ...

    def has_unfinished(self) -> bool:
        """Whether a step has work to do."""
        ...

    def step(self) -> list[str]:
        """Advances; returns the ids that changed, once for every new token."""
        ...

    def is_finished(self, request_id: str) -> bool:
        """Whether a request has ended."""
        ...

    def output(self, request_id: str) -> RequestOutput:
        """A snapshot."""
        ...

    def forget(self, request_id: str) -> None:
        """Ends a request if need be and drops it."""
        ...


class EngineClosedError(RuntimeError):
    """The engine was closed, or died of the exception in __cause__, while or before a request ran."""


Delivery = RequestOutput | EngineClosedError
"""What comes back for a submission."""


class Ticket:
    """One submission on its way: the outputs come out in order, the finished one last.

    Args:
      submission: what runs.
      stream: deliver an output after every step that changed it, not only the finished one.
      deliver: gets every output, or the error that ends them, on the driver's thread; None keeps them for next_output.
    """

    def __init__(self, submission: Submission, *, stream: bool, deliver: Callable[[Delivery], None] | None = None):
        self.submission = submission
        self.stream = stream
        self.request_id: str | None = None
        self.num_tokens = 0
        self._outbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.deliver = self._outbox.put if deliver is None else deliver

    def next_output(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the next output.

        Args:
          timeout: seconds to wait at most; None waits for ever.

        Raises:
          queue.Empty: none came in time.
          EngineClosedError: none will come.
        """
        output = self._outbox.get(timeout=timeout)
        if isinstance(output, EngineClosedError):
            raise output
        return output


class Driver:
    """Steps a controller on a thread of its own while there is work.

    Args:
      controller: touched by the driver's thread alone from now on.
    """

    def __init__(self, controller: Drivable):
        self._controller = controller
        self._changed = threading.Condition()
        self._inbox: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._tickets: dict[str, Ticket] = {}
        self._error: EngineClosedError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        submissions: Sequence[Submission],
        *,
        stream: bool = False,
        deliver: Callable[[Delivery], None] | None = None,
    ) -> list[Ticket]:
        """Hands in prepared submissions; all of them start before the next step.

        Args:
          submissions: from the controller's prepare.
          stream, deliver: as Ticket's.

        Raises:
          EngineClosedError: the engine is closed or dead.
        """
        tickets = [Ticket(submission, stream=stream, deliver=deliver) for submission in submissions]
        with self._changed:
            if self._error is not None:
                raise EngineClosedError(str(self._error)) from self._error.__cause__
            self._inbox.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Ends requests that are still running before the next step; nothing more is delivered."""
        with self._changed:
            self._cancelled.extend(tickets)
            self._changed.notify()

    def close(self) -> None:
        """Stops the thread after the step at hand; waiting callers get an EngineClosedError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        error = EngineClosedError("the LLM was closed")
        try:
            while self._take_in():
                for request_id, num_tokens in Counter(self._controller.step()).items():
                    self._deliver(request_id, num_tokens)
        except Exception as cause:
            # Whatever broke a step has broken the device state; everybody who waits must hear of it.
            error = EngineClosedError(f"the engine stopped: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        with self._changed:
            self._error = error
            waiting = [*self._tickets.values(), *self._inbox]
        for ticket in waiting:
            ticket.deliver(error)

    def _take_in(self) -> bool:
        """Waits for work and starts or ends what was handed in; False when closing."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._inbox or self._cancelled or self._controller.has_unfinished()
            )
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
        for ticket in inbox:
            ticket.request_id = self._controller.submit(ticket.submission)
            self._tickets[ticket.request_id] = ticket
            if self._controller.is_finished(ticket.request_id):
                self._deliver(ticket.request_id, 0)
        for ticket in cancelled:
            request_id = ticket.request_id
            if request_id is not None and self._tickets.pop(request_id, None) is not None:
                self._controller.forget(request_id)
        return True

    def _deliver(self, request_id: str, num_tokens: int) -> None:
        ticket = self._tickets[request_id]
        ticket.num_tokens += num_tokens
        finished = self._controller.is_finished(request_id)
        if ticket.stream or finished:
            ticket.deliver(self._controller.output(request_id))
        if finished:
            del self._tickets[request_id]
            self._controller.forget(request_id)
