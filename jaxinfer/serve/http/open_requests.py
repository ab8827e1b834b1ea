"""OpenRequests: the requests that are being answered.

Owns: how many there may be, in all and of one client; waking streams that had no news for a while; and their end when
the server stops.
Does not know: what requests ask for.

Everything here happens in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Generator

from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.response import Response
from jaxinfer.serve.http.updates import Updates
from jaxinfer.serve.interfaces.errors import RefusedError
from jaxinfer.serve.interfaces.exchange import Stream

_TICK_SECONDS = 0.5
_RETRY_SECONDS = 1


class OpenRequest:
    """A request that is being answered.

    Args:
      response: its answer.
    """

    def __init__(self, response: Response):
        self.response = response
        self.num_samples = 1
        self.stream: Stream | None = None
        """What makes events of its answers; None unless they come as a stream."""
        self.updates: Updates | None = None
        """What is new of these answers; None before they are started."""
        self.aborted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets an exception if the request must end early."""

    def abort(self, error: Exception) -> None:
        """Makes the request end with an error."""
        if not self.aborted.done():
            self.aborted.set_exception(error)


class OpenRequests:
    """Admits requests, and watches over those that are open.

    Args:
      config: the limits.
      num_running: samples that the engine can run at the same time.
    """

    def __init__(self, config: ServeConfig, *, num_running: int):
        self._config = config
        self._most_samples = num_running + config.max_waiting
        self._open: set[OpenRequest] = set()
        self._of_client: Counter[str] = Counter()
        self._ticker: asyncio.Task[None] | None = None
        self.is_draining = False
        """Whether no more requests are taken."""

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def admitted(self, client: str, request: OpenRequest) -> Generator[None]:
        """Admits a request while the context lasts.

        Args:
          client: who asks.
          request: what is asked; it counts as one sample until `count` says how many it wants.

        Raises:
          RefusedError: the server is full or stops, or the client has enough requests running.
        """
        self._check_client(client)
        if self.is_draining:
            raise RefusedError(
                "the server is being stopped",
                status=503,
                kind="server_error",
                code="server_stopped",
                retry_after=_RETRY_SECONDS,
            )
        self._check_room(1)
        self._open.add(request)
        self._of_client[client] += 1
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            self._open.discard(request)
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]
            if request.aborted.done():
                request.aborted.exception()  # so that asyncio does not complain that nobody looked

    def count(self, request: OpenRequest, num_samples: int) -> None:
        """Admits the samples that a request wants.

        Raises:
          RefusedError: there is no room for so many.
        """
        if num_samples > self._most_samples:
            raise RefusedError(
                f"{num_samples} samples are wanted, the server takes {self._most_samples} at a time; ask for fewer",
                status=400,
            )
        self._check_room(num_samples - request.num_samples)
        request.num_samples = num_samples

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and ends those that are left after so many seconds with an error."""
        if not self.is_draining:
            self.is_draining = True
            asyncio.get_running_loop().call_later(seconds, self._abort_all)

    def _abort_all(self) -> None:
        error = RefusedError(
            "the server was stopped before the answer was complete",
            status=503,
            kind="server_error",
            code="server_stopped",
            retry_after=_RETRY_SECONDS,
        )
        for request in self._open:
            request.abort(error)

    def _check_room(self, num_samples: int) -> None:
        num_open = sum(request.num_samples for request in self._open)
        if num_open + num_samples > self._most_samples:
            raise RefusedError(
                f"the server is full: {num_open} samples run or wait, {num_samples} more would exceed the limit of "
                f"{self._most_samples}; send the request again later",
                status=503,
                kind="server_error",
                code="server_full",
                retry_after=_RETRY_SECONDS,
            )

    def _check_client(self, client: str) -> None:
        limit = self._config.max_per_client
        if limit is not None and self._of_client[client] >= limit:
            raise RefusedError(
                f"this client has {limit} requests running, which is the limit; wait for one of them",
                status=429,
                kind="rate_limit_error",
                code="too_many_requests",
                retry_after=_RETRY_SECONDS,
            )

    async def _watch(self) -> None:
        """Looks at all streams now and then, for as long as there are any."""
        try:
            while self._open:
                await asyncio.sleep(_TICK_SECONDS)
                for request in self._open:
                    if request.updates is not None and request.response.quiet_seconds > self._config.keep_alive:
                        request.updates.wake()
        finally:
            self._ticker = None
