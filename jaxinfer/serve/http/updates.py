"""Updates: what is new of the answers to one request, for the task that sends it.

Owns: starting the request's submissions, waking its task once for all that is new, and their end when it leaves.
Does not know: events, responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from jaxinfer.api.driver import Ticket
from jaxinfer.api.llm import LLM
from jaxinfer.api.loop_waker import LoopWaker
from jaxinfer.outputs import RequestDelta
from jaxinfer.text.preparation import Submission


class Updates:
    """The answers to a request's submissions while they grow; a context manager for one task.

    Args:
      llm: runs them.
      submissions: from the LLM's prepare methods.

    Raises:
      EngineClosedError: the LLM is closed.
    """

    def __init__(self, llm: LLM, submissions: Sequence[Submission]):
        self._llm = llm
        self._loop = asyncio.get_running_loop()
        self._waker = LoopWaker.of(self._loop)
        self._waiting: asyncio.Future[None] | None = None
        self._is_woken = False
        self._open: dict[int, Ticket] = {}
        try:
            for number, submission in enumerate(submissions):
                self._open[number] = llm.start(submission, stream=True, on_update=self._tell)
        except BaseException:
            self.close()
            raise

    @property
    def go_on(self) -> bool:
        """Whether an answer is not complete yet."""
        return bool(self._open)

    def wake(self) -> None:
        """Ends the wait for deltas, whether there are any or not; called in the loop."""
        self._is_woken = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self) -> list[tuple[int, RequestDelta]]:
        """Waits until it is woken.

        Returns:
          What is new of each answer, by the number of its submission; nothing if something else has woken it.

        Raises:
          RequestFailedError, EngineClosedError: as AsyncLLM.generate.
        """
        if not self._is_woken:
            self._waiting = self._loop.create_future()
            await self._waiting
        self._is_woken = False
        deltas = []
        for number, ticket in list(self._open.items()):
            delta = ticket.take_delta()
            if delta is not None:
                deltas.append((number, delta))
                if delta.finished:
                    del self._open[number]
        return deltas

    def close(self) -> None:
        """Aborts what is not complete."""
        for ticket in self._open.values():
            self._llm.cancel(ticket)

    def __enter__(self) -> Updates:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tell(self, ticket: Ticket) -> None:
        """Called on the engine's thread."""
        try:
            self._waker.call_soon(self.wake)
        except RuntimeError:  # the event loop is closed, so no task can read the answers any more
            self._llm.cancel(ticket)
