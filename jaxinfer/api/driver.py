"""One thread that drives a controller, so that any number of threads (and Ctrl-C) can come and go around it.

Owns: the thread, the inbox of submissions and cancellations, and the tickets through which answers are read.
Does not know: prompts' meaning, the engine, devices.

Whatever happens, everybody who holds a ticket hears of the end: by a finished output, by RequestFailedError if the
request itself failed, by EngineClosedError if the engine did, or by CancelledError after cancel.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxinfer.errors import INTERRUPTS, EngineClosedError, RequestFailedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.text.preparation import Submission

logger = logging.getLogger("jaxinfer")


@runtime_checkable
class Answer(Protocol):
    """What a driver sees of the answer to a submission; any thread may look at it while it grows."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether it grows no more."""
        ...

    def output(self) -> RequestOutput:
        """A snapshot, or RequestFailedError; only one thread takes them."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


@runtime_checkable
class Drivable(Protocol[AnswerT]):
    """What a driver asks of a controller, on the driver's thread."""

    def submit(self, submission: Submission) -> AnswerT:
        """Starts a prepared submission."""
        ...

    def has_unfinished(self) -> bool:
        """Whether a step has work to do."""
        ...

    def step(self) -> Sequence[AnswerT]:
        """Advances; returns the answers that changed."""
        ...

    def forget(self, answer: AnswerT) -> None:
        """Ends an answer if need be and drops what is kept for it."""
        ...


class Ticket(Generic[AnswerT]):
    """One submission on its way, for one reader.

    Nothing is queued for the reader: it gets the state at the time it looks, however long ago it last did.

    Args:
      submission: what runs.
      stream: give out unfinished outputs too.
      on_news: called when take may have something new, on the engine's thread or on the one that cancels; it must not
        block. Without it next_output can wait for news.
    """

    def __init__(
        self, submission: Submission, *, stream: bool, on_news: Callable[[Ticket[AnswerT]], None] | None = None
    ):
        self.submission = submission
        self.stream = stream
        self.answer: AnswerT | None = None
        self.error: RuntimeError | None = None
        self.is_cancelled = False
        self._num_taken = 0
        # SimpleQueue, since its put may come amid another one: a stream that is garbage cancels from anywhere.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.on_news = on_news
        self._has_news = False

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return 0 if self.answer is None else self.answer.num_tokens

    def take(self) -> RequestOutput | None:
        """The newest output, without waiting.

        Returns:
          None if there is none, or only what was taken before; a finished output is given again.

        Raises:
          RequestFailedError: the request failed.
          EngineClosedError: the engine was closed or died before the request had ended.
          CancelledError: the request was cancelled.
        """
        self._has_news = False  # before looking, so that what comes meanwhile is told again
        if self.is_cancelled:
            raise CancelledError("the request was cancelled")
        if self.error is not None:
            raise self.error
        answer = self.answer
        if answer is None or not (answer.is_finished or (self.stream and answer.num_tokens > self._num_taken)):
            return None
        output = answer.output()
        self._num_taken = sum(len(completion.token_ids) for completion in output.outputs)
        return output

    def next_output(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the next output.

        Args:
          timeout: seconds to wait at most; None waits for ever.

        Raises:
          TimeoutError: none came in time.
          As take.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (output := self.take()) is None:
            try:
                self._news.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError(f"no output came within {timeout} s") from None
        return output

    def tell(self) -> None:
        """Tells the reader that take may have something new; for the driver."""
        if not self._has_news:
            self._has_news = True
            self._news.put(None)
            if self.on_news is not None:
                self.on_news(self)

    def cancel(self) -> None:
        """Ends the reader's waiting; for the driver, which ends the request."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.tell()


class Driver(Generic[AnswerT]):
    """Steps a controller on a thread of its own while there is work.

    Args:
      controller: touched by the driver's thread alone from now on.
      on_end: called on that thread when it ends, after every ticket has heard of it.
    """

    def __init__(self, controller: Drivable[AnswerT], *, on_end: Callable[[], None] = lambda: None):
        self._controller = controller
        self._on_end = on_end
        self._changed = threading.Condition()
        self._inbox: deque[Ticket[AnswerT]] = deque()
        self._cancelled: deque[Ticket[AnswerT]] = deque()
        self._open: set[Ticket[AnswerT]] = set()  # handed in and not ended
        self._tickets: dict[AnswerT, Ticket[AnswerT]] = {}  # of the answers that grow
        self._error: EngineClosedError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether submissions are taken: neither was it closed, nor did a step fail."""
        return self._error is None and not self._closing

    def submit(
        self,
        submissions: Sequence[Submission],
        *,
        stream: bool = False,
        on_news: Callable[[Ticket[AnswerT]], None] | None = None,
    ) -> list[Ticket[AnswerT]]:
        """Hands in prepared submissions; all of them start before the next step.

        Args:
          submissions: from the controller's prepare.
          stream, on_news: as Ticket's.

        Raises:
          EngineClosedError: the engine is closed or dead.
        """
        tickets = [Ticket(submission, stream=stream, on_news=on_news) for submission in submissions]
        with self._changed:
            if self._error is not None:
                raise EngineClosedError(str(self._error)) from self._error.__cause__
            self._open.update(tickets)
            self._inbox.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket[AnswerT]]) -> None:
        """Ends requests that are still running before the next step; their readers get a CancelledError at once."""
        with self._changed:
            self._cancelled.extend(tickets)
            self._changed.notify()
        for ticket in tickets:
            ticket.cancel()

    def close(self) -> None:
        """Stops the thread after the step at hand; waiting callers get an EngineClosedError.

        On the driver's own thread, where the garbage collector may end an LLM, it only says so and returns.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        error = EngineClosedError("the LLM was closed")
        try:
            while self._wait_for_work():
                self._take_in()
                for answer in self._controller.step():
                    self._tell(answer, self._tickets[answer])
        except BaseException as cause:
            # Whatever broke a step has broken the device state; everybody who waits must hear of it.
            error = EngineClosedError(f"the engine stopped: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        with self._changed:
            self._error = error
            tickets = list(self._open)
        for ticket in tickets:
            self._end(ticket, error)
        self._on_end()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; False when closing."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._inbox or self._cancelled or self._controller.has_unfinished()
            )
        return not self._closing

    def _take_in(self) -> None:
        """Starts and ends what was handed in."""
        while self._inbox:
            self._start(self._inbox.popleft())
        while self._cancelled:
            self._drop(self._cancelled.popleft())

    def _start(self, ticket: Ticket[AnswerT]) -> None:
        if ticket.is_cancelled:
            self._open.discard(ticket)
            return
        try:
            answer = self._controller.submit(ticket.submission)
        except INTERRUPTS:
            raise
        except BaseException as error:
            self._end(ticket, RequestFailedError.caused_by(error))
            return
        self._tickets[answer] = ticket
        ticket.answer = answer
        if answer.is_finished:
            self._tell(answer, ticket)

    def _tell(self, answer: AnswerT, ticket: Ticket[AnswerT]) -> None:
        """Tells a reader of a change; a reader that cannot be told loses its request, nobody else's."""
        is_finished = answer.is_finished
        if is_finished:
            self._controller.forget(answer)  # first, so that whoever sees the end sees that its pages are free
            del self._tickets[answer]
        try:
            if is_finished or ticket.stream:
                ticket.tell()
        except INTERRUPTS:
            raise
        except BaseException as error:
            logger.warning("a request ends, since its reader cannot be told of its output: %r", error)
            ticket.on_news = None
            self._drop(ticket)
            self._end(ticket, RequestFailedError.caused_by(error))
        if is_finished:
            self._open.discard(ticket)

    def _drop(self, ticket: Ticket[AnswerT]) -> None:
        """Ends a request about which nobody is to be told."""
        if ticket.answer is not None and self._tickets.pop(ticket.answer, None) is not None:
            self._controller.forget(ticket.answer)
        self._open.discard(ticket)

    def _end(self, ticket: Ticket[AnswerT], error: RuntimeError) -> None:
        """Ends a ticket with an error."""
        ticket.error = error
        try:
            ticket.tell()
        except Exception as failure:
            logger.warning("a reader cannot be told of an error (%s): %r", error, failure)
        self._open.discard(ticket)
