"""Endpoints: what answers the requests of an interface.

Owns: reading bodies, running what was read, sending the answer as a whole or as a stream, and noticing that the client
has left.
Does not know: what requests and answers say (interfaces/).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from jaxinfer.api.async_llm import AsyncLLM
from jaxinfer.errors import EngineClosedError, RequestFailedError
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.metrics import Metrics
from jaxinfer.serve.http.open_requests import OpenRequest, OpenRequests
from jaxinfer.serve.http.report import Report
from jaxinfer.serve.http.response import Response, encode_json
from jaxinfer.serve.http.updates import Updates
from jaxinfer.serve.interfaces.errors import SERVER_FAILED, WRONG_REQUEST, ErrorFacts, RefusedError, error_facts
from jaxinfer.serve.interfaces.exchange import Exchange, Interface, Label, Lookup, Stream
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission

logger = logging.getLogger("jaxinfer")
_T = TypeVar("_T")
_CLIENT_LEFT = 499
_MOST_CHARACTERS = 200
"""Of an address in the log, which may be anything."""
_EXPECTED = (RefusedError, RequestFailedError, EngineClosedError)


class ClientLeftError(Exception):
    """The client has closed the connection before its answer was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """What all endpoints share.

    Args:
      served: the model.
      llm: runs the requests.
      open_requests: those that are being answered.
      metrics: numbers about them.
    """

    served: ServedModel
    llm: AsyncLLM
    open_requests: OpenRequests
    metrics: Metrics

    @property
    def config(self) -> ServeConfig:
        """The settings."""
        return self.served.config

    def new_report(self, scope: Scope, route: str, name: str) -> Report:
        """A report of a request that has just come.

        Args:
          scope: of ASGI.
          route: the address as the server knows it, or a word for addresses that it does not.
          name: of the request.
        """
        return Report(
            self.metrics,
            route=route,
            path=scope["path"][:_MOST_CHARACTERS],
            method=scope["method"],
            client=client_of(scope),
            request_id=name,
            is_logged=self.config.access_log,
        )


class Endpoint:
    """Answers the requests at one address; an ASGI application.

    Args:
      server: what all endpoints share.
      path: the address, for the log.
      error: the body of an answer that is an error.
    """

    def __init__(self, server: Server, path: str, *, error: Callable[[ErrorFacts], Mapping[str, Any]]):
        self.server = server
        self._path, self._error = path, error

    async def work(self, request: OpenRequest, body: bytes, name: str, report: Report) -> None:
        """Answers a request whose body has come.

        Args:
          request: has the response to send.
          body: of the request.
          name: of the request.
          report: is told what happens.
        """
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        server, name = self.server, uuid.uuid4().hex
        response = Response(send, name)
        report = server.new_report(scope, self._path, name)
        request = OpenRequest(response)
        try:
            with server.open_requests.admitted(client_of(scope), request):
                body = await _unless_aborted(request, _read_body(scope, receive, server.config))
                left = _client_left(receive)
                await _unless_aborted(request, self.work(request, body, name, report), left)
        except ClientLeftError:
            report.error = "client left"
        except Exception as error:
            await self._fail(request, error, report)
        finally:
            report.close(response.status if response.is_complete and response.status else _CLIENT_LEFT)

    async def _fail(self, request: OpenRequest, error: Exception, report: Report) -> None:
        """Tells the client of an error, in the place where it has to look for it."""
        facts, response = error_facts(error) if isinstance(error, _EXPECTED) else SERVER_FAILED, request.response
        report.error = facts.code or facts.message
        if not isinstance(error, _EXPECTED):
            logger.error("a request to %s failed", self._path, exc_info=error)
        if response.is_complete:
            return
        if request.stream is not None and response.is_stream:
            await response.send_events(request.stream.failure(facts), is_last=True)
            return
        headers = [] if facts.retry_after is None else [(b"retry-after", b"%d" % facts.retry_after)]
        await response.send_json(facts.status, encode_json(self._error(facts)), headers)


class GenerationEndpoint(Endpoint):
    """Generates.

    Args:
      server: what all endpoints share.
      interface: the requests' form.
    """

    def __init__(self, server: Server, interface: Interface):
        super().__init__(server, interface.path, error=interface.error)
        self._interface = interface

    async def work(self, request: OpenRequest, body: bytes, name: str, report: Report) -> None:
        """See Endpoint."""
        served, label = self.server.served, Label(name=name, created=int(time.time()))
        exchange = await asyncio.to_thread(
            _refusing_mistakes, lambda: self._interface.read(served, decode_object(body), label)
        )
        report.is_stream, report.model = exchange.wants_stream, served.names[0]
        num_samples = sum(map(_num_samples, exchange.submissions))
        self.server.open_requests.count(request, num_samples)
        if exchange.wants_stream:
            report.num_samples = num_samples
            request.stream = exchange.stream()
            await self._stream(exchange, request, request.stream, report)
        else:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self.server.llm.run(one)) for one in exchange.submissions]
            outputs = [task.result() for task in running]
            report.complete(outputs)
            # In a thread: while the log-probabilities of a long answer become JSON, streams must not stand still.
            answer = await asyncio.to_thread(lambda: encode_json(exchange.answer(outputs)))
            await request.response.send_json(200, answer)

    async def _stream(self, exchange: Exchange, request: OpenRequest, stream: Stream, report: Report) -> None:
        """Sends the answers while they grow, and a comment when they do not for a while."""
        response, keep_alive = request.response, self.server.config.keep_alive
        with Updates(self.server.llm.llm, exchange.submissions) as updates:
            request.updates = updates
            while updates.go_on:
                deltas = await updates.next()
                events = list(stream.opening()) if deltas and not report.has_begun else []
                for number, delta in deltas:
                    report.progress(number, delta)
                    events += stream.progress(number, delta)
                if events:
                    await response.send_events(events)
                elif response.quiet_seconds > keep_alive:
                    await response.send_comment()
        await response.send_events(stream.closing(), is_last=True)


class LookupEndpoint(Endpoint):
    """Answers without generating.

    Args:
      server: what all endpoints share.
      lookup: the requests' form.
    """

    def __init__(self, server: Server, lookup: Lookup):
        super().__init__(server, lookup.path, error=lookup.error)
        self._answer = lookup.answer

    async def work(self, request: OpenRequest, body: bytes, name: str, report: Report) -> None:
        """See Endpoint."""
        served = self.server.served
        answer = await asyncio.to_thread(_refusing_mistakes, lambda: self._answer(served, decode_object(body)))
        await request.response.send_json(200, encode_json(answer))


def client_of(scope: Scope) -> str:
    """Who asks: the key that was used, as the guard found it, or else the address."""
    address = scope["client"][0] if scope.get("client") else "unknown"
    return scope.get("jaxinfer.client", address)


def decode_object(body: bytes) -> dict[str, Any]:
    """The object in a body.

    Raises:
      ValueError: the body is no JSON, or another value.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the body must be JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the body must be an object, got {fields!r:.80}")
    return fields


async def _read_body(scope: Scope, receive: Receive, config: ServeConfig) -> bytes:
    """The whole body of a request.

    Raises:
      RefusedError: it is too large, or does not come.
      ClientLeftError: the client has left.
    """
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    too_large = RefusedError(
        f"the body must have at most {config.max_body_bytes} bytes (the server's max_body_bytes)",
        status=413,
        code="request_too_large",
    )
    if declared.isdigit() and int(declared) > config.max_body_bytes:
        raise too_large
    parts, num_bytes, goes_on = [], 0, True
    try:
        async with asyncio.timeout(config.stall_timeout):
            while goes_on:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                parts.append(message.get("body", b""))
                num_bytes += len(parts[-1])
                if num_bytes > config.max_body_bytes:
                    raise too_large
                goes_on = message.get("more_body", False)
    except TimeoutError:
        raise RefusedError(
            f"the request's body did not come within {config.stall_timeout:g} s", status=408, code="request_timeout"
        ) from None
    return b"".join(parts)


async def _unless_aborted(
    request: OpenRequest, work: Coroutine[Any, Any, _T], *others: Coroutine[Any, Any, None]
) -> _T:
    """Does some work for a request, unless that is aborted before the work is done, or one of the others raises.

    Raises:
      What the request is aborted with, or what the work or another raises; of a group of exceptions, the first.
    """
    working = asyncio.ensure_future(work)
    tasks = [working, *map(asyncio.ensure_future, others)]
    try:
        await asyncio.wait((*tasks, request.aborted), return_when=asyncio.FIRST_COMPLETED)
        ended = next(task for task in (*tasks, request.aborted) if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    try:
        ended.result()
        return working.result()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientLeftError


def _refusing_mistakes(read: Callable[[], _T]) -> _T:
    """Reads a request, whose own mistakes become refusals. What goes wrong later is the server's fault."""
    try:
        return read()
    except WRONG_REQUEST as error:
        raise RefusedError.of(error) from error


def _num_samples(submission: Submission) -> int:
    beams = submission.beam_search
    return len(submission.requests) if beams is None else beams.beam_width
