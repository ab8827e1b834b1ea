"""What runs the prepared requests of an LLM: here, an engine of this process and the thread that drives it.

Owns: Runner, the interface that LLM uses, and LocalRunner, which needs no other process.
Does not know: prompts, what other processes do (see shared_runners.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from jaxinfer.api.driver import Driver, Ticket
from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.api.output_stream import wait_for
from jaxinfer.engine.stats import EngineStats
from jaxinfer.errors import EngineClosedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.text.preparation import Submission

Work = Callable[[LoadedEngine, TextGenerationController], None]


class Runner(ABC):
    """Runs prepared requests; any thread may use it."""

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """Whether requests are accepted."""

    @abstractmethod
    def run(self, submissions: Sequence[Submission], *, show_bar: bool) -> list[RequestOutput]:
        """Runs requests and waits for their outputs, which come in the same order."""

    @abstractmethod
    def start(
        self, submission: Submission, *, stream: bool = True, on_update: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """Starts a request, whose outputs are read from the ticket while it runs."""

    @abstractmethod
    def cancel(self, ticket: Ticket) -> None:
        """Ends a request that was started."""

    @abstractmethod
    def warmup(self, *, background: bool = False) -> None:
        """Compiles all programs."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """The engine's load and counts."""

    @abstractmethod
    def between_requests(self, work: Work, *, abort: bool = False, refuse: EngineClosedError | None = None) -> None:
        """Waits until no request runs, does some work on the engine, and lets requests go on.

        Requests that come meanwhile wait for it. Where there are replicas, each does the work in its own time.

        Args:
          work: called on the engine's thread with the engine and its controller.
          abort: end the running requests with "abort" instead of waiting for them.
          refuse: what later requests are refused with, until the next call; None takes them.

        Raises:
          ValueError: several processes hold the engine.
          EngineClosedError: the engine is closed.
          Whatever the work raises.
        """

    @abstractmethod
    def follow(self) -> None:
        """Takes part in what the leading process computes until it closes the engine."""

    @abstractmethod
    def drain(self, seconds: float) -> None:
        """Takes no new requests and waits until the present ones are done, at most for so many seconds."""

    @abstractmethod
    def fail(self, error: EngineClosedError) -> None:
        """Ends all requests with an error, and takes no new ones."""

    @abstractmethod
    def close(self) -> None:
        """Ends running requests and frees device memory; later calls do nothing."""


class LocalRunner(Runner):
    """Runs requests on an engine of this process.

    Args:
      loaded: the engine.
      controller: makes text of its tokens.
    """

    def __init__(self, loaded: LoadedEngine, controller: TextGenerationController):
        self._loaded = loaded
        self._controller = controller
        self.driver = Driver(controller, on_end=loaded.close)

    @property
    def is_running(self) -> bool:
        """See Runner."""
        return self.driver.is_running

    def run(self, submissions: Sequence[Submission], *, show_bar: bool) -> list[RequestOutput]:
        """See Runner."""
        tickets = self.driver.submit(submissions)
        try:
            return wait_for(tickets, show_bar=show_bar)
        except BaseException:  # after Ctrl-C or an error this call's requests end; those of other threads go on
            self.driver.cancel(tickets)
            raise

    def start(
        self, submission: Submission, *, stream: bool = True, on_update: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """See Runner."""
        return self.driver.submit([submission], stream=stream, on_update=on_update)[0]

    def cancel(self, ticket: Ticket) -> None:
        """See Runner."""
        self.driver.cancel([ticket])

    def num_cached_pages(self, page_hashes: Sequence[bytes]) -> int:
        """How many pages of a text's beginning the engine's prefix cache has."""
        return self._loaded.engine.num_cached_pages(page_hashes)

    def warmup(self, *, background: bool = False) -> None:
        """See Runner."""
        self._loaded.warmup(background=background)

    def stats(self) -> EngineStats:
        """See Runner."""
        return self._loaded.stats()

    def between_requests(self, work: Work, *, abort: bool = False, refuse: EngineClosedError | None = None) -> None:
        """See Runner."""
        self.driver.between_requests(lambda: work(self._loaded, self._controller), abort=abort, refuse=refuse)

    def follow(self) -> None:
        """Refuses: there is no process to follow."""
        raise ValueError("follow() is for the processes of a run that do not lead it; this one runs alone")

    def drain(self, seconds: float) -> None:
        """See Runner."""
        self.driver.drain(seconds)

    def fail(self, error: EngineClosedError) -> None:
        """See Runner."""
        self.driver.fail(error)

    def close(self) -> None:
        """See Runner."""
        self.driver.close()
