"""Guard: lets through who may use the server.

Owns: keys, which web pages may ask, and the names by which the server may be called.
Does not know: routes. Everything behind it is guarded, unknown addresses included.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.response import encode_json
from jaxinfer.serve.interfaces.errors import ErrorFacts, RefusedError, anthropic_error, error_facts, openai_error

_WRONG_KEY = RefusedError(
    "a key must be sent, as Authorization: Bearer KEY or as x-api-key: KEY; none or a wrong one came",
    status=401,
    kind="authentication_error",
    code="invalid_api_key",
)
_WRONG_ORIGIN = RefusedError(
    "web pages of other origins may not use this server; its setting cors_origins says which may",
    status=403,
    kind="permission_error",
    code="origin_not_allowed",
)
_WRONG_HOST = RefusedError(
    "this server is not called by that name; its setting allowed_hosts says how it may be, and with a key it may be "
    "called anything",
    status=421,
    kind="permission_error",
    code="host_not_allowed",
)


class Guard:
    """An ASGI application in front of another.

    Args:
      inner: the other.
      config: has the keys and the origins.
      checks_hosts: whether to look at the name by which the server is called; see ServeConfig.allowed_hosts.
      report_refused: told of every request that is refused, and why.
      locked_page: HTML for a browser that comes without a key.
    """

    def __init__(
        self,
        inner: ASGIApp,
        config: ServeConfig,
        *,
        checks_hosts: bool,
        report_refused: Callable[[Scope, ErrorFacts], None],
        locked_page: bytes,
    ):
        self._report_refused = report_refused
        self._inner = inner
        self._keys = [_digest(key.encode()) for key in config.keys]
        self._origins = frozenset(config.cors_origins or ())
        self._hosts = {"localhost", config.host, *(config.allowed_hosts or ())}
        self._checks_hosts = checks_hosts and not self._keys and is_loopback(config.host)
        self._locked_page = locked_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        headers = dict(scope["headers"])
        if self._checks_hosts and not self._is_called_rightly(headers):
            await self._refuse(scope, send, error_facts(_WRONG_HOST), headers)
            return
        if not self._may_ask(headers):
            await self._refuse(scope, send, error_facts(_WRONG_ORIGIN), headers)
            return
        if self._keys:
            client = self._client(headers)
            if client is None:
                wants_page = scope["path"].endswith("/") and b"text/html" in headers.get(b"accept", b"")
                page = self._locked_page if wants_page else None
                await self._refuse(scope, send, error_facts(_WRONG_KEY), headers, page=page)
                return
            scope["jaxinfer.client"] = client
        await self._inner(scope, receive, send)

    def _client(self, headers: dict[bytes, bytes]) -> str | None:
        """Which key came; None if no right one did. All keys are compared, so that the time tells nothing."""
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b""))
        found = [number for number, key in enumerate(self._keys) if hmac.compare_digest(key, given)]
        return f"key {found[0]}" if found else None

    def _may_ask(self, headers: dict[bytes, bytes]) -> bool:
        """Whether no browser asks on behalf of a page of another origin, which could be anybody's."""
        origin = headers.get(b"origin")
        if origin is None or "*" in self._origins or origin.decode("latin-1") in self._origins:
            return True
        return origin.partition(b"://")[2] == headers.get(b"host", b"")

    def _is_called_rightly(self, headers: dict[bytes, bytes]) -> bool:
        """Whether the client calls the server by an address or an allowed name."""
        name = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]")
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return not name
        return True

    async def _refuse(
        self, scope: Scope, send: Send, facts: ErrorFacts, headers: dict[bytes, bytes], *, page: bytes | None = None
    ) -> None:
        self._report_refused(scope, facts)
        is_anthropic = b"anthropic-version" in headers
        body = encode_json(anthropic_error(facts) if is_anthropic else openai_error(facts)) if page is None else page
        kind = b"application/json" if page is None else b"text/html; charset=utf-8"
        about = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        if facts.status == 401:
            about.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": facts.status, "headers": about})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, as a comparison in constant time needs."""
    return hashlib.sha256(key).digest()
