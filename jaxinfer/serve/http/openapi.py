"""The server's OpenAPI document, made of the classes that describe requests.

Owns: the document's form; reading types, meanings, defaults and ranges from the classes and their docstrings.
Does not know: how requests are answered.

Source: OpenAPI 3.1.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jaxinfer
from jaxinfer.config.field_help import field_help
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.interfaces.body import SAMPLING_FIELDS
from jaxinfer.serve.interfaces.catalogue import INTERFACES, LOOKUPS
from jaxinfer.serve.interfaces.exchange import Interface, Lookup

_NUMBER = r"(-?[\d][\d,]*(?:\.\d+)?)(?!\*)"
_RANGES = (
    (re.compile(rf"\[{_NUMBER}, {_NUMBER}\]"), ("minimum", "maximum")),
    (re.compile(rf"\({_NUMBER}, {_NUMBER}\]"), ("exclusiveMinimum", "maximum")),
    (re.compile(rf"{_NUMBER} \.\. {_NUMBER}"), ("minimum", "maximum")),
    (re.compile(rf"{_NUMBER} \.\. "), ("minimum",)),
    (re.compile(rf">= {_NUMBER}"), ("minimum",)),
    (re.compile(rf"> {_NUMBER}"), ("exclusiveMinimum",)),
)
"""How docstrings write ranges, and the words of JSON schema for them. The first one that is found counts."""
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array"}
_ERRORS = {
    "400": "the request is wrong; the message names the field",
    "401": "a key is missing",
    "404": "there is no such model",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "429": "this client has enough requests running",
    "500": "the request failed",
    "503": "the server is full or stops; Retry-After says when to come again",
}
_TOLD = {
    "/health": "Whether the engine runs; needs no key.",
    "/ready": "Whether requests find their programs compiled.",
    "/metrics": "Numbers in Prometheus's text format.",
    "/tokenizer_info": "The texts of the tokenizer's special tokens, and the chat template.",
    "/v1/models": "The model's names.",
}


def openapi(*, title: str, keys: bool, defaults: SamplingParams) -> dict[str, Any]:
    """The document.

    Args:
      title: of the server.
      keys: whether requests need one.
      defaults: sampling settings of requests that name none.
    """
    schemas = {"SamplingParams": _sampling_schema(defaults), "Error": _ERROR_SCHEMA}
    paths: dict[str, Any] = {path: {"get": _get(path, text)} for path, text in _TOLD.items()}
    for one in (*INTERFACES, *LOOKUPS):
        schemas |= {body.__name__: _body_schema(body) for body in one.bodies}
        method = one.method if isinstance(one, Interface) else "POST"
        paths[one.path] = {method.lower(): _operation(one, defaults)}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": jaxinfer.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


def _operation(one: Interface | Lookup, defaults: SamplingParams) -> dict[str, Any]:
    takes_sampling = isinstance(one, Interface) and one.takes_sampling
    parts = [_reference(body) for body in one.bodies] + (
        [_sampling_beside(one.bodies, defaults)] if takes_sampling else []
    )
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if takes_sampling:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": _summary(one.bodies[0]),
        "operationId": one.path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"allOf": parts}}}},
        "responses": {"200": {"description": "the answer", "content": content}} | _error_responses(),
    }


def _reference(described: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{described.__name__}"}


def _sampling_beside(bodies: Sequence[type], defaults: SamplingParams) -> dict[str, Any]:
    """The fields of SamplingParams, without those that mean something else in a body (logprobs of chats)."""
    own = {name for body in bodies for name in body.__annotations__}
    whole = _sampling_schema(defaults)
    left = {name: schema for name, schema in whole["properties"].items() if name not in own}
    return _reference(SamplingParams) if left.keys() == whole["properties"].keys() else whole | {"properties": left}


def _get(path: str, text: str) -> dict[str, Any]:
    kind = "text/plain" if path == "/metrics" else "application/json"
    answer = {"description": "the answer", "content": {kind: {}}}
    stopped = {"503": {"description": "not now", "content": {"application/json": {}}}}
    return {
        "summary": text,
        "operationId": path.strip("/").replace("/", "_"),
        "responses": {"200": answer} | (stopped if path in ("/health", "/ready") else {}),
    }


def _error_responses() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}


_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}


def _sampling_schema(defaults: SamplingParams) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(SamplingParams), field_help(SamplingParams)
    properties = {
        entry.name: _property(hints[entry.name], texts[entry.name]) | {"default": getattr(defaults, entry.name)}
        for entry in dataclasses.fields(SamplingParams)
        if entry.name in SAMPLING_FIELDS
    }
    return {"type": "object", "description": _summary(SamplingParams), "properties": properties}


def _body_schema(body: type) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(body), field_help(body)
    return {
        "type": "object",
        "description": _summary(body),
        "properties": {name: _property(hint, texts[name]) for name, hint in hints.items()},
        "required": sorted(body.__required_keys__),  # pyrefly: ignore[missing-attribute]
    }


def _property(hint: Any, text: str) -> dict[str, Any]:
    schema = _type_schema(hint)
    is_number = not {"integer", "number"}.isdisjoint(_kinds(schema))
    return schema | (_range(text) if is_number else {}) | {"description": text}


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def _type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type; anything for types that JSON lacks.

    Example:
      >>> _type_schema(int | None), _type_schema(Sequence[int])
      ({'type': ['integer', 'null']}, {'type': 'array', 'items': {'type': 'integer'}})
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin in (list, Sequence):
        items = _type_schema(arguments[0])
        return {"type": "array"} | ({"items": items} if items else {})
    if origin in (dict, Mapping):
        return {"type": "object"}
    if origin is typing.Required:
        return _type_schema(arguments[0])
    parts = [_type_schema(part) for part in arguments]
    if parts and all(part.keys() == {"type"} for part in parts):
        return {"type": [part["type"] for part in parts]}
    return {"anyOf": parts} if parts and all(parts) else {}


def _range(text: str) -> dict[str, Any]:
    """The range that a docstring tells of.

    Example:
      >>> _range("keep tokens, [0, 1]; 1 is off."), _range("new tokens, >= 0."), _range("seed, 0 .. 2**63 - 1")
      ({'minimum': 0, 'maximum': 1}, {'minimum': 0}, {'minimum': 0})
    """
    for pattern, words in _RANGES:
        found = pattern.search(text)
        if found is not None:
            return {word: _number(one) for word, one in zip(words, found.groups(), strict=True)}
    return {}


def _number(text: str) -> int | float:
    plain = text.replace(",", "")
    return float(plain) if "." in plain else int(plain)


def _summary(described: type) -> str:
    return (described.__doc__ or "").strip().partition("\n")[0]
