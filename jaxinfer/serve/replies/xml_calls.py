"""The calls of Qwen 3 Coder and Qwen 3.5, whose arguments are texts between tags.

Owns: where such a call and its arguments end, and which values the texts stand for.
Does not know: where in a reply calls are (parser.py).

Source: these models' chat templates. An argument's text may hold the same tags, so its end is a closing tag that is
followed by what may follow; and some replies lack that tag, or the one before the call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from jaxinfer.serve.replies.calls import Reading, Tools
from jaxinfer.serve.replies.json_text import read_json, unique, write_arguments
from jaxinfer.serve.replies.parts import ToolCall

_FUNCTION = re.compile(r"\s*(?:<function=)?([\w.-]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?")
_CALL_END = re.compile(r"</function>\s*")
_VALUE_END = re.compile(r"\n?</parameter>\s*(?=<parameter=[^>\n]+>|</function>)")
_UNCLOSED_END = r"\n(?=</function>\s*</tool_call>{})"
_LITERALS = {"True": True, "False": False, "None": None}
_KINDS = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, list: {"array"}, dict: {"object"}}


@dataclass(frozen=True, slots=True)
class XmlCalls:
    """`<function=name>`, then `<parameter=key>`, value and `</parameter>` for each argument, and `</function>`."""

    openers: tuple[str, ...] = ("<tool_call>", "<function=")
    closer: str = "</tool_call>"
    beginnings: tuple[str, ...] = ()
    strips: bool = True

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """See CallSyntax."""
        if not ended and ">" not in added:
            return None
        head = _FUNCTION.match(text)
        if head is None:
            return None
        properties = _properties(tools.get(head[1], {}))
        arguments: list[tuple[str, Any]] = []
        place = head.end()
        while (start := _PARAMETER.match(text, place)) is not None:
            end = _end_of_value(text, start.end(), properties)
            if end is None:
                return None
            value = text[start.end() : end.start()]
            arguments.append((start[1], _value(value, _kinds(properties.get(start[1], {})))))
            place = end.end()
        end = _CALL_END.match(text, place)
        rest = "" if end is None else text[end.end() :]
        is_closed = rest.startswith(self.closer)
        if end is None or (self.closer.startswith(rest) and not is_closed and not ended):
            return None
        try:
            call = ToolCall(head[1], write_arguments(unique(arguments)))
        except ValueError:
            return None
        return Reading((call,), end.end() + len(self.closer) if is_closed else place + len("</function>"))


def _end_of_value(text: str, start: int, names: Set[str] | Mapping[str, Any]) -> re.Match[str] | None:
    """Where a value ends that begins at a place: before the first line with which the next one may begin, too."""
    openers = "".join(f"|<parameter={re.escape(name)}>\n" for name in names)
    found = [_VALUE_END.search(text, start), re.compile(_UNCLOSED_END.format(openers)).search(text, start)]
    return min((end for end in found if end is not None), key=lambda end: end.start(), default=None)


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _kinds(schema: Any) -> set[str]:
    """The types that a schema allows, alternatives included; none if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type", [])
    found = {kinds} if isinstance(kinds, str) else {kind for kind in kinds if isinstance(kind, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        entries = schema.get(key)
        found |= {kind for entry in entries for kind in _kinds(entry)} if isinstance(entries, list) else set()
    return found


def _value(text: str, kinds: set[str]) -> Any:
    """What a text stands for: a value of one of these types if it can be read as one, or else the text."""
    word = text.strip()
    try:
        value, end = (_LITERALS[word], len(word)) if word in _LITERALS else read_json(word)
    except ValueError:
        return text
    if end < len(word) or isinstance(value, str):
        return text
    fitting = {"null"} if value is None else _KINDS[type(value)]
    return value if fitting & kinds or not kinds else text
