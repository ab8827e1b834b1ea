"""What is wrong with a request, and the bodies that say so.

Owns: the statuses, types and codes of errors; the bodies of OpenAI's and Anthropic's APIs.
Does not know: HTTP beyond the numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jaxinfer.errors import EngineClosedError, RequestFailedError
from jaxinfer.request import RequestTooLongError

WRONG_REQUEST = (TypeError, ValueError, ImportError, RecursionError)
"""What a request's own mistakes raise."""
TOO_LONG = "context_length_exceeded"
"""The code of a request that does not fit. Clients that shorten it and come again look for words of OpenAI's or
Anthropic's own message."""
_FIELD = re.compile(
    r"(?:unknown argument ')?([a-z][a-zA-Z_]*)(?:'| entry| key|[.\[][^ ]*)?"
    r"(?:$|[:;]| must| needs| demands| names| has token)"
)
"""The field that an error is about, with which its message begins."""
_MOST_CHARACTERS = 1000
"""Of a message, which may repeat what a client has sent."""
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class RefusedError(Exception):
    """A request that is refused.

    Args:
      message: says what was expected.
      status: of HTTP.
      kind: OpenAI's "type" of the error.
      code: OpenAI's "code", by which programs tell errors apart.
      param: the field that is wrong.
      retry_after: seconds after which the request may be sent again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.retry_after = status, kind, code, param, retry_after

    @classmethod
    def of(cls, error: BaseException) -> RefusedError:
        """A refusal for a request's own mistake."""
        facts = error_facts(error)
        return cls(facts.message, status=facts.status, kind=facts.kind, code=facts.code, param=facts.param)


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """An error as a client learns of it; fields as RefusedError's."""

    message: str
    status: int
    kind: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None


SERVER_FAILED = ErrorFacts("the server failed; its log says why", 500, "server_error", "internal_error")


def error_facts(error: BaseException) -> ErrorFacts:
    """What a client learns of an error.

    Example:
      >>> error_facts(ValueError("top_p must be in (0, 1], got 2"))
      ErrorFacts(message='top_p must be in (0, 1], got 2', status=400, kind='invalid_request_error', code=None, \
param='top_p', retry_after=None)
    """
    text = str(error)
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
    if isinstance(error, RefusedError):
        return ErrorFacts(text, error.status, error.kind, error.code, error.param, error.retry_after)
    if isinstance(error, RequestTooLongError):
        return ErrorFacts(text, 400, "invalid_request_error", TOO_LONG)
    if isinstance(error, WRONG_REQUEST):
        found = _FIELD.match(text)
        return ErrorFacts(text, 400, "invalid_request_error", None, found[1] if found else None)
    if isinstance(error, EngineClosedError):
        return ErrorFacts(text, 503, "server_error", "engine_stopped")
    if isinstance(error, RequestFailedError):
        return ErrorFacts(text, 500, "server_error", "request_failed")
    return SERVER_FAILED


def openai_error(facts: ErrorFacts) -> dict[str, Any]:
    """The body of OpenAI's API."""
    message = facts.message
    if facts.code == TOO_LONG:
        message = f"This model's maximum context length is exceeded: {message}"
    return {"error": {"message": message, "type": facts.kind, "param": facts.param, "code": facts.code}}


def anthropic_error(facts: ErrorFacts) -> dict[str, Any]:
    """The body of Anthropic's API."""
    message = f"prompt is too long: {facts.message}" if facts.code == TOO_LONG else facts.message
    return {"type": "error", "error": {"type": _ANTHROPIC.get(facts.status, "api_error"), "message": message}}


def error_body(error: BaseException) -> dict[str, Any]:
    """The body of OpenAI's API for an error."""
    return openai_error(error_facts(error))
