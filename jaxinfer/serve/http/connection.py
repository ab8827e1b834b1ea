"""Connection: uvicorn's connection, with an end for clients that neither send nor read, and limits before any request.

Owns: the limits of a connection: their number, the size of a request's head, and how long a client may take.
Does not know: requests.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxinfer.serve.config import ServeConfig

MAX_HEAD_BYTES = 64 << 10
_HEAD_END = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(HttpToolsProtocol):
    """A connection that is closed when the head of a request does not come, or an answer is not read.

    The head of a request is kept until it is whole. An offer to go on with another protocol is then taken out of it:
    Java's clients offer HTTP/2 with every request, after which httptools would not read the body.

    What the system does not take at once pauses the writer, so that a client that reads slowly costs no memory.
    """

    config_of_server = ServeConfig()
    """The settings of the server."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._head = b""
        self._is_in_message = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_unread = 0

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > self.config_of_server.max_connections:
            transport.abort()
            return
        if transport.get_extra_info("sslcontext") is None:  # with TLS, uvloop never resumes from a limit of 0
            transport.set_write_buffer_limits(high=0)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._is_in_message or not (self.cycle is None or self.cycle.response_complete):
            super().data_received(data)
            return
        if self._head_timer is None:
            self._await_head()
        self._head += data
        end = self._head.find(_HEAD_END)
        if max(end, 0 if end >= 0 else len(self._head)) > MAX_HEAD_BYTES:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif end >= 0:
            whole, self._head = self._head, b""
            super().data_received(_UPGRADE.sub(b"", whole[: end + 2]) + whole[end + 2 :])

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._is_in_message = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See httptools."""
        self._is_in_message = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.config_of_server.stall_timeout, self.transport.abort)

    def _await_reader(self) -> None:
        self._num_unread = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.config_of_server.stall_timeout, self._check_reader)

    def _check_reader(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_unread:
            self._await_reader()
        else:
            self.transport.abort()


def connection_type(config: ServeConfig) -> type[Connection]:
    """The type of connections with these settings, which uvicorn makes by itself."""
    return type("Connection", (Connection,), {"config_of_server": config})
