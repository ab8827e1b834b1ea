"""JsonRecord, a base class that writes dataclasses as lines of JSON and reads them back.

Owns: the format of a line and its version; turning JSON back into typed fields.
Does not know: jax, which dataclasses there are.

Reading is code of our own. Of the libraries for it, msgspec ignores unknown fields of a dataclass and refuses a union
of a dataclass and a mapping (SamplingParams.structured), and cattrs needs a hook of ours for almost every rule below.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

FORMAT = 1
"""Version of the format, written into every line; a line of another version is refused."""
_SHOWN_CHARACTERS = 60


class JsonRecord:
    """Base of dataclasses that can be written as one line of JSON and read back.

    Fields may be plain values, sequences (read back as tuples), mappings, other dataclasses, and unions of these.
    Reading checks that every field without a default is in the line and that types fit; further checks are up to the
    dataclass's __post_init__.
    """

    __slots__ = ()

    def to_json(self) -> str:
        """Writes the record as one line of ASCII, without a line break at its end."""
        fields = dataclasses.asdict(typing.cast(Any, self))
        return json.dumps({"format": FORMAT, **fields})

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads a record that to_json wrote.

        Raises:
          ValueError: the line is not a JSON object or of an unknown format version, or a field is missing, unknown or
            wrong.
        """
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {_shown(fields)}")
        found = fields.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"unknown format version {_shown(found)}, this version of jaxinfer reads {FORMAT}")
        try:
            return from_fields(cls, fields)
        except TypeError as error:  # raised by checks of the dataclasses, beside ValueError
            raise ValueError(str(error)) from error


def from_fields(cls: type, fields: Mapping[str, Any]) -> Any:
    """Makes a dataclass from the values of its fields, as JSON has them.

    Raises:
      ValueError: a field is missing, unknown or wrong.
    """
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of {cls.__name__}")
    for name, entry in known.items():
        if name not in fields and entry.default is entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing field {name!r} of {cls.__name__}")
    return cls(**{name: _value(name, hints[name], value) for name, value in fields.items()})


def _value(name: str, hint: Any, value: Any) -> Any:
    """Makes a field's value from its JSON; for a union, the first member that can hold the value is taken."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    for option in typing.get_args(hint) if is_union else (hint,):
        if _fits(option, value):
            return _converted(name, option, value)
    raise ValueError(f"{name} must be {inspect.formatannotation(hint)}, got {_shown(value)}")


def _fits(hint: Any, value: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if kind is Any:
        return True
    if kind is Literal:
        return value in typing.get_args(hint)
    if dataclasses.is_dataclass(kind) or issubclass(kind, Mapping):
        return isinstance(value, dict)
    if issubclass(kind, Sequence) and kind is not str:
        return isinstance(value, list)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _converted(name: str, hint: Any, value: Any) -> Any:
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_fields(typing.cast(type, hint), value)
    if isinstance(value, list) and arguments:
        return tuple(_value(f"{name} entry", arguments[0], entry) for entry in value)
    if isinstance(value, dict) and arguments:
        return {
            int(key) if arguments[0] is int and key.isdecimal() else key: _value(f"{name}[{key}]", arguments[1], entry)
            for key, entry in value.items()
        }
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.{_SHOWN_CHARACTERS}}"
