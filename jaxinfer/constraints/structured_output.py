"""StructuredOutput: the user's description of what the whole output must look like.

Owns: the class and the checks of its fields, which are made once, at construction.
Does not know: grammars and tokens; structured.py turns it into a constraint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.config.keywords import names_nearest_field


def _require_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} of type {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must be a non-empty string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can write, got a lone surrogate in {value!r}") from error
    return value


def _require_schema(name: str, value: object) -> str:
    """Returns a JSON schema as JSON text, whether it was given as text or as a dict."""
    expected = f"{name} must be a JSON object, as a dict or as its text"
    if not isinstance(value, (str, Mapping)):
        raise TypeError(f"{expected}, got {value!r} of type {type(value).__name__}")
    try:
        schema = json.loads(value) if isinstance(value, str) else dict(value)
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{expected}, got {value!r:.200}, which is none: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{expected}, got {value!r:.200}")
    return text


def _require_choices(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of non-empty strings, got {value!r}")
    if not value:
        raise ValueError(f"{name} must be a sequence of at least one non-empty string, got {value!r}")
    return tuple(_require_text(f"{name} entry", entry) for entry in value)


@names_nearest_field
@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutput:
    """What the whole output must look like; exactly one of the fields is given.

    Args:
      json: a JSON schema, as a dict or as its text (kept as text); {} is any JSON object.
      regex: a regular expression in the syntax of Rust's regex crate; it must match the output from end to end.
      choice: non-empty strings, at least one; the output is one of them.
      lark: a context-free grammar in llguidance's dialect of Lark; its rule `start` is the output.

    Raises:
      TypeError, ValueError: no field or several are given, or its value is wrong; the message names the field.

    Example:
      >>> StructuredOutput(json={"type": "integer"}).json
      '{"type": "integer"}'
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        require = {"json": _require_schema, "regex": _require_text, "choice": _require_choices, "lark": _require_text}
        given = [name for name in require if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(require)
            raise ValueError(f"structured must have exactly one of {names}, got {', '.join(given) or 'none'}")
        object.__setattr__(self, given[0], require[given[0]](f"structured.{given[0]}", getattr(self, given[0])))
