"""JSON as models write it, and as clients get it.

Owns: reading a value from the middle of a text, and writing the arguments of a call.
Does not know: calls.
"""

from __future__ import annotations

import json
from typing import Any


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at a place of a text, and the place behind it.

    Raises:
      ValueError: there is none, it is not complete, or a key comes twice in it.

    Example:
      >>> read_json('call: {"a": 1} and more', 5)
      ({'a': 1}, 14)
    """
    while text[start : start + 1].isspace():
        start += 1
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_arguments(arguments: Any) -> str:
    """The arguments of a call as JSON, which UTF-8 can write.

    Raises:
      ValueError: they are no object, hold a number that JSON lacks, or are nested too deeply.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be an object, got {arguments!r:.80}")
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character that was written as an escape, and stays one
        return json.dumps(arguments)
    return text


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these entries.

    Raises:
      ValueError: a key comes twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, object_pairs_hook=unique)
