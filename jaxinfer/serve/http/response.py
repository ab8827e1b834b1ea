"""Response: an answer on its way to a client, in one piece or as server-sent events.

Owns: the encoding, the headers, and what is sent in which order.
Does not know: what answers say.

Source: the WHATWG's HTML standard, section "Server-sent events".
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import Send

from jaxinfer.serve.interfaces.exchange import DONE, Event

_ENCODER = msgspec.json.Encoder()
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would keep events back
]


def encode_json(value: Any) -> bytes:
    """A value as JSON; numbers that JSON lacks (infinities, NaN) become null."""
    return _ENCODER.encode(value)


def encode_event(event: Event) -> bytes:
    """An event as it is sent.

    Example:
      >>> encode_event(Event({"x": 1}, "delta"))
      b'event: delta\\ndata: {"x":1}\\n\\n'
    """
    data = b"[DONE]" if event.data is DONE else _ENCODER.encode(event.data)
    name = b"" if event.name is None else f"event: {event.name}\n".encode()
    return b"%bdata: %b\n\n" % (name, data)


class Response:
    """Sends one answer, for one task at a time.

    Args:
      send: of ASGI.
      request_id: sent back, so that clients can name the request.
    """

    def __init__(self, send: Send, request_id: str):
        self._send = send
        name = request_id.encode("latin-1")
        self._request_id = ((b"x-request-id", name), (b"request-id", name))  # as OpenAI and Anthropic call it
        self._loop = asyncio.get_running_loop()
        self.status: int | None = None
        """The status that was sent; None before."""
        self.is_stream = self.is_complete = False
        self._last_sent = self._loop.time()

    @property
    def quiet_seconds(self) -> float:
        """How long nothing was sent."""
        return self._loop.time() - self._last_sent

    async def send_json(self, status: int, content: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Sends an answer in one piece, which is JSON already."""
        about = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await self._start(status, [*about, *headers])
        await self._send_body(content, more_body=False)

    async def send_events(self, events: Iterable[Event], *, is_last: bool = False) -> None:
        """Sends events of a stream, which begins with the first of them.

        Args:
          events: are sent together.
          is_last: whether the stream ends with them.
        """
        await self._send_stream(b"".join(map(encode_event, events)), is_last=is_last)

    async def send_comment(self) -> None:
        """Sends what clients ignore, so that nobody takes the connection for dead."""
        await self._send_stream(b": keep-alive\n\n", is_last=False)

    async def _send_stream(self, content: bytes, *, is_last: bool) -> None:
        if not self.is_stream:
            self.is_stream = True
            await self._start(200, _STREAM_HEADERS)
        if content or is_last:
            await self._send_body(content, more_body=not is_last)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._request_id]})

    async def _send_body(self, content: bytes, *, more_body: bool) -> None:
        self.is_complete = not more_body
        await self._send({"type": "http.response.body", "body": content, "more_body": more_body})
        self._last_sent = self._loop.time()
