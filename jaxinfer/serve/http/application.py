"""app(): an LLM as an ASGI application.

Owns: which address leads where.
Does not know: how requests are answered (endpoint.py), sockets (server.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxinfer.api.async_llm import AsyncLLM
from jaxinfer.api.llm import LLM
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.endpoint import GenerationEndpoint, LookupEndpoint, Server
from jaxinfer.serve.http.guard import Guard
from jaxinfer.serve.http.metrics import CONTENT_TYPE, Metrics
from jaxinfer.serve.http.open_requests import OpenRequests
from jaxinfer.serve.http.openapi import openapi
from jaxinfer.serve.http.report import show_access_log
from jaxinfer.serve.http.response import encode_json
from jaxinfer.serve.http.warmup import Warmup
from jaxinfer.serve.interfaces.catalogue import INTERFACES, LOOKUPS
from jaxinfer.serve.interfaces.errors import ErrorFacts, RefusedError, error_facts, openai_error
from jaxinfer.serve.page import locked_page, page
from jaxinfer.serve.served_model import ServedModel


class Application:
    """The ASGI application of one LLM.

    Args:
      llm: the model; it is not closed with the application.
      config: the settings. Those that concern sockets are for servers alone.
      checks_hosts: whether this is the whole server, so that the names by which it is called matter.
    """

    def __init__(self, llm: LLM, config: ServeConfig, *, checks_hosts: bool = False):
        served = ServedModel.of(llm, config, names=[llm.name or "model"])
        self.open_requests = OpenRequests(config, num_running=llm.config.max_num_seqs * llm.config.data_parallel_size)
        metrics = Metrics(llm, model_name=served.names[0], open_requests=self.open_requests)
        server = Server(served=served, llm=AsyncLLM.of(llm), open_requests=self.open_requests, metrics=metrics)
        if config.access_log:
            show_access_log()
        self.warmup = Warmup(llm, wanted=config.warmup)
        health = Route("/health", _Health(llm).answer)
        # It is there behind the guard, too, where a method that it does not know is told from an unknown address.
        inner = Router([*_answering_routes(server), *_telling_routes(server, self), health], redirect_slashes=False)
        self._report = functools.partial(_report, server, "refused")
        guard = Guard(inner, config, checks_hosts=checks_hosts, report_refused=self._report, locked_page=locked_page())
        self._router = Router([health, Mount("/", app=guard)], redirect_slashes=False)
        self._answer: ASGIApp = self._route
        if config.cors_origins:
            self._answer = CORSMiddleware(
                self._route,
                allow_origins=list(config.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            raise NotImplementedError(f"this server knows HTTP only, got {scope['type']!r}")
        await self._answer(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leads a request to its place. The middleware of a Starlette application would look at every event."""
        scope["app"] = self  # so that routes raise an exception for what is not there
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            facts = _no_route(scope, error)
            self._report(scope, facts)
            body = encode_json(openai_error(facts))
            answer = Response(body, facts.status, media_type="application/json", headers=error.headers)
            await answer(scope, receive, send)


def app(llm: LLM | AsyncLLM, config: ServeConfig | None = None, **settings: Any) -> Application:
    """Makes an ASGI application, to be mounted in another one or run by any ASGI server.

    Args:
      llm: the model; closing it stays with the caller.
      config: how to serve it; None is ServeConfig(**settings).
      **settings: fields of ServeConfig, in place of config.

    Raises:
      TypeError, ValueError: a setting is unknown or wrong.

    Example:
      application = Starlette(routes=[Mount("/llm", app=jaxinfer.serve.app(llm))])
    """
    if config is not None and settings:
        raise TypeError(f"pass either config or settings by name, got both: {', '.join(settings)}")
    return Application(llm.llm if isinstance(llm, AsyncLLM) else llm, config or ServeConfig(**settings))


def _answering_routes(server: Server) -> list[BaseRoute]:
    generation = [
        Route(interface.path, GenerationEndpoint(server, interface), methods=[interface.method])
        for interface in INTERFACES
    ]
    lookups = [Route(one.path, LookupEndpoint(server, one), methods=["POST"]) for one in LOOKUPS]
    return [*generation, *lookups]


def _telling_routes(server: Server, application: Application) -> list[BaseRoute]:
    """Routes that tell of the server and its model."""
    served, created = server.served, int(time.time())

    async def ready(request: Request) -> Response:
        if application.open_requests.is_draining:
            return _json({"status": "stopping"}, 503)
        if not served.llm.is_running:
            return _json({"status": "stopped"}, 503)
        is_ready = application.warmup.is_done
        return _json({"status": "ready" if is_ready else "warming up"}, 200 if is_ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_model(served, name, created) for name in served.names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            served.answering_name(name)
        except RefusedError as error:
            return _json(openai_error(error_facts(error)), error.status)
        return _json(_model(served, name, created))

    async def tokenizer_info(request: Request) -> Response:
        return _json(served.tokenizer_info)

    async def playground(request: Request) -> Response:
        return HTMLResponse(page(), headers={"content-security-policy": "frame-ancestors 'self'"})

    async def document(request: Request) -> Response:
        title, keys = f"jaxinfer: {served.names[0]}", bool(server.config.keys)
        return _json(openapi(title=title, keys=keys, defaults=served.default_params))

    return [
        _reported(server, "/", playground),
        _reported(server, "/openapi.json", document),
        Route("/ready", ready),
        Route("/metrics", metrics),
        _reported(server, "/tokenizer_info", tokenizer_info),
        _reported(server, "/v1/models", models),
        _reported(server, "/v1/models/{name:path}", model),
    ]


class _Health:
    """Says whether the engine runs, which needs no key."""

    def __init__(self, llm: LLM):
        self._llm = llm

    async def answer(self, request: Request) -> Response:
        return _json({"status": "ok"}) if self._llm.is_running else _json({"status": "stopped"}, 503)


def _model(served: ServedModel, name: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "jaxinfer",
        "root": served.names[0],
        "parent": None,
        "max_model_len": served.llm.max_model_len,
        "has_chat_template": served.has_template,
    }


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(encode_json(body), status, media_type="application/json")


def _report(server: Server, route: str, scope: Scope, facts: ErrorFacts | None = None, status: int = 200) -> None:
    """Reports a request that was answered at once, or refused.

    Args:
      server: what was asked.
      route: names it in the metrics.
      scope: of ASGI.
      facts: why it was refused; None if it was not.
      status: of an answer.
    """
    report = server.new_report(scope, route, "none")
    report.error = None if facts is None else facts.code
    report.close(status if facts is None else facts.status)


def _reported(server: Server, path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
    """A route whose requests are reported; those of probes are not, which would drown the others."""

    async def reported(request: Request) -> Response:
        response = await answer(request)
        _report(server, path, request.scope, status=response.status_code)
        return response

    return Route(path, reported)


def _no_route(scope: Scope, error: HTTPException) -> ErrorFacts:
    """What to tell of a request for what is not there."""
    status, path, method = error.status_code, scope["path"], scope["method"]
    text = f"{path} is not there" if status == 404 else f"{path} is not there for {method}"
    code = "not_found" if status == 404 else "method_not_allowed"
    return error_facts(RefusedError(f"{text}; /openapi.json lists what is", status=status, code=code))
