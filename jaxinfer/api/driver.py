"""The background thread that steps the controller, and the tickets through which other threads read the results.

The controller and its engine are not thread-safe, so one thread steps them. Any number of other threads hand
submissions to that thread and wait for their outputs; one of them being interrupted (Ctrl-C) does not disturb the rest.

Owns: the thread, the inbox of submissions and cancellations, and the tickets.
Does not know: what prompts mean, the engine, devices.

Every ticket is told how its request ended: with a finished output, with RequestFailedError if the request failed, with
EngineClosedError if the engine was closed or failed, or with CancelledError after cancel.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxinfer.errors import INTERRUPTS, EngineClosedError, RequestFailedError
from jaxinfer.outputs import RequestDelta, RequestOutput
from jaxinfer.text.preparation import Submission

logger = logging.getLogger("jaxinfer")
_DRAIN_SECONDS = 0.05


@runtime_checkable
class Answer(Protocol):
    """What a driver needs of the answer to a submission; its properties may be read by any thread while it grows."""

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and will not change any more."""
        ...

    def output(self) -> RequestOutput:
        """Returns a snapshot of the answer, or raises RequestFailedError. Only one thread, the reader's, calls it."""
        ...

    def delta(self) -> RequestDelta:
        """Returns what is new since the last delta or output, or raises as output. Only the reader calls it."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


@runtime_checkable
class Drivable(Protocol[AnswerT]):
    """What a driver needs of a controller; it calls these methods on the driver's thread only."""

    def submit(self, submission: Submission) -> AnswerT:
        """Starts a prepared submission."""
        ...

    def has_unfinished(self) -> bool:
        """Whether a step has work to do."""
        ...

    def step(self) -> Sequence[AnswerT]:
        """Runs one engine step; returns the answers that changed."""
        ...

    def forget(self, answer: AnswerT) -> None:
        """Aborts an answer if it still grows, and frees everything that is kept for it."""
        ...


class Ticket(Generic[AnswerT]):
    """One submission that was handed to the driver; one reader gets its outputs from here.

    Outputs are not queued. A reader that looks rarely gets one output with all tokens that came in between.

    Args:
      submission: the request.
      stream: also give out unfinished outputs; without it only the finished one.
      on_update: called with the ticket when take may have something new, on the driver's thread or on the one that
        cancels; it must not block. Without it the reader waits with next_output.
    """

    def __init__(
        self, submission: Submission, *, stream: bool, on_update: Callable[[Ticket[AnswerT]], None] | None = None
    ):
        self.submission = submission
        self.stream = stream
        self.answer: AnswerT | None = None
        self.error: RuntimeError | None = None
        self.is_cancelled = False
        self._num_taken = 0
        # SimpleQueue.put is reentrant: the garbage collector may cancel a dropped stream in the middle of another put.
        self._updates: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.on_update = on_update
        self._has_update = False

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far; 0 before the request starts."""
        return 0 if self.answer is None else self.answer.num_tokens

    @property
    def has_ended(self) -> bool:
        """Whether take has the last thing to tell: the finished output, or an error."""
        return self.is_cancelled or self.error is not None or (self.answer is not None and self.answer.is_finished)

    def take(self) -> RequestOutput | None:
        """Returns the newest output without waiting.

        Returns:
          None if there is no output yet or no new token since the last take. A finished output is returned every time.

        Raises:
          RequestFailedError: the request failed.
          EngineClosedError: the engine was closed or died before the request had ended.
          CancelledError: the request was cancelled.
        """
        answer = self._changed_answer()
        if answer is None:
            return None
        output = answer.output()
        self._num_taken = sum(len(completion.token_ids) for completion in output.outputs)
        return output

    def take_delta(self) -> RequestDelta | None:
        """Returns what is new since the last take or take_delta; None and errors as take."""
        answer = self._changed_answer()
        if answer is None:
            return None
        delta = answer.delta()
        for completion in delta.outputs:
            self._num_taken += len(completion.token_ids)
        return delta

    def _changed_answer(self) -> AnswerT | None:
        """The answer, if there is something to take."""
        self._has_update = False  # reset before looking, so that a token that comes meanwhile makes tell notify again
        if self.is_cancelled:
            raise CancelledError("the request was cancelled")
        if self.error is not None:
            raise self.error
        answer = self.answer
        has_news = answer is not None and (answer.is_finished or (self.stream and answer.num_tokens > self._num_taken))
        return answer if has_news else None

    def next_output(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the next output.

        Args:
          timeout: seconds to wait at most; None waits without limit.

        Raises:
          TimeoutError: no output came in time.
          As take.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (output := self.take()) is None:
            try:
                self._updates.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError(f"no output came within {timeout} s") from None
        return output

    def tell(self) -> None:
        """Notifies the reader that take may have something new; called by the driver."""
        if not self._has_update:
            self._has_update = True
            self._updates.put(None)
            if self.on_update is not None:
                self.on_update(self)

    def cancel(self) -> None:
        """Makes the reader's wait end with CancelledError; called by the driver, which also ends the request."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.tell()


class _Pause:
    """Work for the driver's thread between requests.

    Args:
      work: what is done.
      abort: whether running requests are ended for it.
      refuse: what later requests are refused with; None takes them.
    """

    def __init__(self, work: Callable[[], None], *, abort: bool, refuse: EngineClosedError | None):
        self.work = work
        self.abort = abort
        self.refuse = refuse
        self.done: Future[None] = Future()


class Driver(Generic[AnswerT]):
    """Runs a thread that steps a controller while it has unfinished requests, and sleeps otherwise.

    Args:
      controller: only the driver's thread may submit to it and step it from now on.
      on_end: called on that thread when it ends, after every open ticket got its error.
    """

    def __init__(self, controller: Drivable[AnswerT], *, on_end: Callable[[], None] = lambda: None):
        self._controller = controller
        self._on_end = on_end
        self._changed = threading.Condition()
        self._inbox: deque[Ticket[AnswerT]] = deque()
        self._cancelled: deque[Ticket[AnswerT]] = deque()
        self._pauses: deque[_Pause] = deque()
        self._refusal: EngineClosedError | None = None
        self._open: set[Ticket[AnswerT]] = set()  # submitted and not ended, started or not
        self._tickets: dict[AnswerT, Ticket[AnswerT]] = {}  # started and not ended
        self._error: EngineClosedError | None = None
        self._closing = self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether submissions are accepted: False once the driver was closed or a step failed."""
        return self._error is None and not self._closing

    @property
    def num_open(self) -> int:
        """Submissions that have not ended, started or not."""
        return len(self._open)

    def submit(
        self,
        submissions: Sequence[Submission],
        *,
        stream: bool = False,
        on_update: Callable[[Ticket[AnswerT]], None] | None = None,
    ) -> list[Ticket[AnswerT]]:
        """Queues prepared submissions for the driver's thread, which starts all of them before its next step.

        Args:
          submissions: from the controller's prepare or prepare_beam_search.
          stream, on_update: as Ticket's.

        Returns:
          One ticket per submission, in order.

        Raises:
          EngineClosedError: the engine is closed or dead.
        """
        tickets = [Ticket(submission, stream=stream, on_update=on_update) for submission in submissions]
        with self._changed:
            self._require_running()
            if self._refusal is not None:
                raise EngineClosedError(str(self._refusal))
            self._open.update(tickets)
            self._inbox.extend(tickets)
            self._changed.notify()
        return tickets

    def between_requests(
        self, work: Callable[[], None], *, abort: bool = False, refuse: EngineClosedError | None = None
    ) -> None:
        """Waits until no request runs, and calls a function on the driver's thread; see Runner.between_requests."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("on_update runs on the engine's thread, which would wait for itself; use another thread")
        pause = _Pause(work, abort=abort, refuse=refuse)
        with self._changed:
            self._require_running()
            self._pauses.append(pause)
            self._changed.notify()
        try:
            pause.done.result()
        except BaseException:
            with self._changed:
                if pause in self._pauses:  # the caller was interrupted before its turn
                    self._pauses.remove(pause)
                    self._changed.notify()
                    raise
            pause.done.exception()  # its turn has come, so the work is done before the caller goes on
            raise

    def _require_running(self) -> None:
        if self._error is not None:
            raise EngineClosedError(str(self._error)) from self._error.__cause__

    def cancel(self, tickets: Sequence[Ticket[AnswerT]]) -> None:
        """Cancels requests: their readers get a CancelledError at once, the engine drops them before its next step."""
        with self._changed:
            self._cancelled.extend(tickets)
            self._changed.notify()
        for ticket in tickets:
            ticket.cancel()

    def close(self) -> None:
        """Stops the thread after the step it is in and waits for that; readers that wait get an EngineClosedError.

        The garbage collector may call it on the driver's own thread, which cannot wait for itself: there it only marks
        the driver as closing and returns.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread and not self._has_failed:
            self._thread.join()

    def drain(self, seconds: float) -> None:
        """Accepts no new submissions and waits until all requests have ended, for so many seconds at most."""
        with self._changed:
            if self._error is None:
                self._error = EngineClosedError("the LLM is being closed")
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            time.sleep(_DRAIN_SECONDS)

    def fail(self, error: EngineClosedError) -> None:
        """Ends all requests with an error, and accepts no more; the thread may be in a step that never ends."""
        with self._changed:
            self._error, self._closing, self._has_failed = error, True, True
            tickets = list(self._open)
            self._changed.notify()
            pauses = list(self._pauses)
        for ticket in tickets:
            self._end(ticket, error)
        _fail_pauses(pauses, error)

    def _run(self) -> None:
        error = EngineClosedError("the LLM was closed")
        try:
            while self._wait_for_work():
                self._take_in()
                pause = self._next_pause()
                if pause is not None:
                    self._do(pause)
                    continue
                for answer in self._controller.step():
                    self._tell(answer, self._tickets[answer])
        except BaseException as cause:
            # After a failed step the device state cannot be trusted, so every open request ends with this error.
            error = EngineClosedError(f"the engine stopped: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
            if isinstance(cause, EngineClosedError):  # another process was lost
                error = cause
        with self._changed:
            self._error = error
            tickets, pauses = list(self._open), list(self._pauses)
        for ticket in tickets:
            self._end(ticket, error)
        _fail_pauses(pauses, error)
        self._on_end()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; returns False if the driver is closing."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closing or self._inbox or self._cancelled or self._pauses or self._controller.has_unfinished()
                )
            )
        return not self._closing

    def _take_in(self) -> None:
        """Starts the submissions and cancels the requests that other threads queued."""
        while self._inbox and not self._pauses:
            self._start(self._inbox.popleft())
        while self._cancelled:
            self._drop(self._cancelled.popleft())

    def _next_pause(self) -> _Pause | None:
        """The pause whose turn it is, if no request runs; an aborting pause ends those that do."""
        with self._changed:
            abort = bool(self._pauses) and self._pauses[0].abort
        if abort:
            for answer, ticket in list(self._tickets.items()):
                self._controller.forget(answer)
                self._tell(answer, ticket)
        with self._changed:
            return self._pauses.popleft() if self._pauses and not self._controller.has_unfinished() else None

    def _do(self, pause: _Pause) -> None:
        try:
            pause.work()
        except BaseException as error:
            pause.done.set_exception(error)
            if isinstance(error, INTERRUPTS):
                raise
        else:
            with self._changed:
                self._refusal = pause.refuse
                refused = list(self._inbox) if pause.refuse is not None else []
            for ticket in refused:
                self._inbox.remove(ticket)
                self._end(ticket, EngineClosedError(str(pause.refuse)))
            pause.done.set_result(None)

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
        """Notifies the reader of a changed answer; if its on_update raises, only this request ends."""
        is_finished = answer.is_finished
        if is_finished:
            self._controller.forget(answer)  # before the reader is told, so that the pages are free once it knows
            del self._tickets[answer]
        try:
            if is_finished or ticket.stream:
                ticket.tell()
        except INTERRUPTS:
            raise
        except BaseException as error:
            logger.warning("a request ends, since its reader cannot be told of its output: %r", error)
            ticket.on_update = None
            self._drop(ticket)
            self._end(ticket, RequestFailedError.caused_by(error))
        if is_finished:
            self._open.discard(ticket)

    def _drop(self, ticket: Ticket[AnswerT]) -> None:
        """Ends a request without notifying its reader."""
        if ticket.answer is not None and self._tickets.pop(ticket.answer, None) is not None:
            self._controller.forget(ticket.answer)
        self._open.discard(ticket)

    def _end(self, ticket: Ticket[AnswerT], error: RuntimeError) -> None:
        """Ends a ticket with an error, of which its reader is notified."""
        ticket.error = error
        try:
            ticket.tell()
        except BaseException as failure:  # whatever it is, the other readers must hear of their end, too
            logger.warning("a reader cannot be told of an error (%s): %r", error, failure)
        self._open.discard(ticket)


def _fail_pauses(pauses: Sequence[_Pause], error: EngineClosedError) -> None:
    for pause in pauses:
        if not pause.done.done():
            pause.done.set_exception(error)
