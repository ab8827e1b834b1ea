"""Calls of tools that a request demands: a grammar lets the model write nothing else.

Owns: the grammar, the text that begins such a reply, and reading it.
Does not know: requests, other replies (parser.py).

A demanded call is JSON whatever the family writes otherwise, since the markers of some families are special tokens,
which a grammar cannot write. Where a family's own calls are JSON between markers, the markers stand around it as usual:
the first one at the end of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.serve.replies.formats import ReplyFormat
from jaxinfer.serve.replies.json_text import read_json, write_arguments
from jaxinfer.serve.replies.parts import Part, ToolCall

MAX_CALLS = 16
"""Calls that a reply may have, so that a weak model comes to an end."""
_DEFINITIONS = ("$defs", "definitions")


class ForcedCalls:
    """Demands calls of some tools.

    Args:
      format: how the model writes its replies.
      schemas: the JSON schema of each tool's arguments, by the tool's name.
      parallel: whether there may be several calls.
    """

    def __init__(self, format: ReplyFormat, schemas: Mapping[str, Mapping[str, Any]], *, parallel: bool):
        self._form = format.forced
        self._schemas = schemas
        self._parallel = parallel

    @property
    def opening(self) -> str:
        """What the prompt ends with."""
        return self._form.opening

    @property
    def grammar(self) -> str:
        """The grammar of the reply, in llguidance's dialect of Lark."""
        calls = [f"call_{number}: %json {json.dumps(schema)}" for number, schema in enumerate(self._call_schemas())]
        names = " | ".join(f"call_{number}" for number in range(len(calls)))
        more = f" ({json.dumps(self._form.between)} call){{0,{MAX_CALLS - 1}}}" if self._parallel else ""
        return "\n".join([f"start: call{more}", f"call: {names}", *calls])

    def parser(self) -> ForcedParser:
        """What reads one reply."""
        return ForcedParser(self._form.arguments)

    def _call_schemas(self) -> Sequence[Mapping[str, Any]]:
        """The schema of each tool's call. What a tool's schema refers to has to be at the root of the whole."""
        return [
            {
                **{key: schema[key] for key in _DEFINITIONS if key in schema},
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    self._form.arguments: {key: value for key, value in schema.items() if key not in _DEFINITIONS},
                },
                "required": ["name", self._form.arguments],
                "additionalProperties": False,
                "x-guidance": {"whitespace_pattern": " ?"},
            }
            for name, schema in self._schemas.items()
        ]


class ForcedParser:
    """Gives out the calls of a reply that the grammar holds; used like ReplyParser.

    Args:
      arguments: the key under which a call has its arguments.
    """

    def __init__(self, arguments: str):
        self._key = arguments
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        """The calls that are whole once this text has been added."""
        self._held += text
        return self._read() if "}" in text else []

    def end(self, *, cut_off: bool = False) -> list[Part]:
        """The calls that are left; one that is cut off is left out."""
        return self._read()

    def _read(self) -> list[Part]:
        found: list[Part] = []
        while (start := self._held.find("{")) >= 0:
            try:
                call, end = read_json(self._held, start)
                found.append(ToolCall(call["name"], write_arguments(call[self._key])))
            except ValueError:
                break
            self._held = self._held[end:]
        return found
