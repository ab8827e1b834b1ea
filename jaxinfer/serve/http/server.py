"""Server: an application on a socket, in this thread or behind a notebook.

Owns: the socket, signals, and how a server ends.
Does not know: what it serves.
"""

from __future__ import annotations

import html
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from jaxinfer import distributed
from jaxinfer.api.llm import LLM
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.application import Application
from jaxinfer.serve.http.connection import connection_type

logger = logging.getLogger("jaxinfer")
_SPARE_SECONDS = 5.0
"""Added to drain_timeout, so that the last error events reach their clients."""
_BACKLOG = 2048


def bound_socket(config: ServeConfig) -> socket.socket:
    """The socket of a server that does not listen yet, so that nobody else can take its port.

    Raises:
      OSError: the address is taken, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((config.host, config.port))
    except OSError as error:
        found.close()
        raise OSError(error.errno, f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    return found


def url_of(config: ServeConfig, bound: socket.socket) -> str:
    """The address at which this machine finds the server, without the root_path that a proxy takes off."""
    port = bound.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'http' if config.ssl_certfile is None else 'https'}://{host}:{port}"


def run_server(
    llm: LLM, config: ServeConfig, bound: socket.socket, *, on_start: Callable[[], None] = lambda: None
) -> None:
    """Serves until the process is told to stop, by SIGTERM or Ctrl-C.

    The first signal ends it in good order: no more requests are taken, and those that run have drain_timeout seconds.
    The second one ends the process at once.

    Args:
      llm: the model.
      config: the settings.
      bound: from bound_socket; is closed in the end.
      on_start: called once connections are taken.
    """
    _Server(Application(llm, config, checks_hosts=True), config, on_start=on_start).run(sockets=[bound])


class BackgroundServer:
    """A server in a thread of its own; a context manager.

    Args:
      llm: the model; it stays open when the server is closed.
      config: the settings.

    Raises:
      OSError: the address is taken, or is not this machine's.
    """

    def __init__(self, llm: LLM, config: ServeConfig):
        bound = bound_socket(config)
        self.url = url_of(config, bound)
        """Where it is found."""
        self._error: BaseException | None = None
        self._has_started = threading.Event()
        try:
            self._application = Application(llm, config, checks_hosts=True)
            self._server = _Server(self._application, config, on_start=self._has_started.set)
        except BaseException:
            bound.close()
            raise
        self._thread = threading.Thread(target=self._run, args=[bound], name="jaxinfer-server", daemon=True)
        self._thread.start()
        self._has_started.wait()
        if self._error is not None:
            raise self._error

    def _run(self, bound: socket.socket) -> None:
        try:
            self._server.run(sockets=[bound])
        except BaseException as error:
            self._error = error
        finally:
            self._has_started.set()

    @property
    def num_requests(self) -> int:
        """Requests that are being answered."""
        return len(self._application.open_requests)

    @property
    def processor_seconds(self) -> float:
        """Processor time that the server's thread has taken, on systems that tell it (not Windows)."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))

    def close(self, *, drain_timeout: float | None = None) -> None:
        """Ends the server as SIGTERM would, and waits for that.

        Args:
          drain_timeout: seconds that running requests have; None is that of the settings.
        """
        if drain_timeout is not None:
            self._server.drain_timeout = drain_timeout
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> BackgroundServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<server at {self.url}>"

    def _repr_html_(self) -> str:
        url = html.escape(self.url)
        return f'<a href="{url}/" target="_blank">{url}</a>'


class _Server(uvicorn.Server):
    """uvicorn's server, which tells our application when it is to stop."""

    def __init__(self, application: Application, config: ServeConfig, *, on_start: Callable[[], None]):
        self._application = application
        self._on_start = on_start
        self.drain_timeout = config.drain_timeout
        super().__init__(
            uvicorn.Config(
                application,
                http=connection_type(config),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                root_path=config.root_path,
                proxy_headers=config.trusted_proxies is not None,
                forwarded_allow_ips=list(config.trusted_proxies or ()),
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                timeout_graceful_shutdown=int(config.drain_timeout + _SPARE_SECONDS),
            )
        )
        self.config.load()  # here, so that a certificate that is none is an error of the caller's

    async def startup(self, sockets: Any = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server, the second the process.

        In a run of several processes, each of them gets a signal of its own once the run ends, which is no second one.
        """
        if self.should_exit:
            run = distributed.current_run()
            if run is None or not run.end.is_due:
                sys.stderr.flush()
                os._exit(128 + sig)
            return
        logger.info("%s: running requests have %g s to end", signal.Signals(sig).name, self.drain_timeout)
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        """See uvicorn."""
        self._application.open_requests.drain(self.drain_timeout)
        await super().shutdown(sockets)
