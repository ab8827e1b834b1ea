"""Reading tokenizer_config.json and the other JSON files beside it.

Owns: the errors that name the file.
Does not know: what the entries are for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a tokenizer's JSON file, which must hold an object.

    Raises:
      ValueError: the file is not JSON or not an object; the message names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file}: expected a JSON object, got broken JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file}: expected a JSON object, got one that is nested too deeply to be read") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")


def token_name(entry: object, file: Path) -> str | None:
    """Returns a special token's text from its entry in tokenizer_config.json.

    Args:
      entry: a string, an object with "content", or None, which gives None.
      file: the file, for the error message.

    Raises:
      ValueError: the entry is anything else.
    """
    if isinstance(entry, dict):
        entry = entry.get("content")
    if entry is None or isinstance(entry, str):
        return entry
    raise ValueError(f'{file}: a special token must be a string or an object with "content", got {entry!r}')
