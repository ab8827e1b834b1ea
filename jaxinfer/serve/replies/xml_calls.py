"""The calls of Qwen 3 Coder and Qwen 3.5, whose arguments are texts between tags.

Owns: where such a call and its arguments end, and which values the texts stand for.
Does not know: where in a reply calls are (parser.py).

Source: these models' chat templates. An argument's text may hold the same tags, so its end is a closing tag that is
followed by what may follow; and some replies lack that tag, or the one before the call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.serve.replies.calls import NO_CALL, Reading, Tools
from jaxinfer.serve.replies.json_text import read_json, unique, write_arguments
from jaxinfer.serve.replies.parts import ToolCall

_FUNCTION = "<function="
_HEAD = re.compile(r"\s*(?:<function=)?([\w.-]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?")
_CALL_END = re.compile(r"</function>\s*")
_VALUE_END = re.compile(r"\n?</parameter>\s*(?=<parameter=[^>\n]+>|</function>)")
_UNCLOSED_END = r"\n(?=</function>\s*</tool_call>{})"
_LONGEST_END = len("</function>\n</tool_call>") + 40
_LITERALS = {"True": True, "False": False, "None": None}
_KINDS = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, list: {"array"}, dict: {"object"}}


@dataclass(frozen=True, slots=True)
class XmlCalls:
    """`<function=name>`, then `<parameter=key>`, value and `</parameter>` for each argument, and `</function>`."""

    openers: tuple[str, ...] = ("<tool_call>", _FUNCTION)
    closer: str = "</tool_call>"
    beginnings: tuple[str, ...] = ()
    strips: bool = True

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """See CallSyntax."""
        if not _may_begin(text[:4096], tools):
            return NO_CALL
        # A call is decided soon behind its last tag, so that most of a long argument is not read again and again.
        if "</function>" not in (text if ended else text[-len(added) - _LONGEST_END :]):
            return None
        head = _HEAD.match(text)
        if head is None:
            return None
        schema = tools.get(head[1], {})
        arguments: list[tuple[str, Any]] = []
        place = head.end()
        while (start := _PARAMETER.match(text, place)) is not None:
            end = _end_of_value(text, start.end(), _properties(schema))
            if end is None:
                return None
            value = text[start.end() : end.start()]
            arguments.append((start[1], _value(value, _kinds(_properties(schema).get(start[1]), schema))))
            place = end.end()
        end = _CALL_END.match(text, place)
        rest = "" if end is None else text[end.end() :]
        is_closed = rest.startswith(self.closer)
        if end is None or (self.closer.startswith(rest) and not is_closed and not ended):
            return None
        try:
            call = ToolCall(head[1], write_arguments(unique(arguments)))
        except ValueError:
            return NO_CALL
        return Reading((call,), end.end() + len(self.closer) if is_closed else place + len("</function>"))


def _may_begin(text: str, tools: Tools) -> bool:
    """Whether a text that follows an opener may become a call. Without `<tool_call>`, only tools that exist count."""
    text = text.lstrip()
    if _FUNCTION.startswith(text):
        return True
    name, tag, rest = text.removeprefix(_FUNCTION).partition(">")
    is_marked, rest = text.startswith(_FUNCTION), rest.lstrip()
    if not tag:
        return bool(re.fullmatch(r"[\w.-]*", name)) and (is_marked or any(tool.startswith(name) for tool in tools))
    follows = any(sign.startswith(rest) or rest.startswith(sign) for sign in ("<parameter=", "</function>"))
    return follows and (bool(re.fullmatch(r"[\w.-]+", name)) if is_marked else name in tools)


def _end_of_value(text: str, start: int, names: Iterable[str]) -> re.Match[str] | None:
    """Where a value ends that begins at a place: before the first line with which the next one may begin, too."""
    closed = _VALUE_END.search(text, start)
    openers = "".join(f"|<parameter={re.escape(name)}>\n" for name in names)
    before = start - 1 if text[start - 1] == "\n" else start  # an empty value shares its line's end
    unclosed = re.compile(_UNCLOSED_END.format(openers)).search(
        text, before, len(text) if closed is None else closed.end()
    )
    found = [end for end in (closed, unclosed) if end is not None]
    return min(found, key=lambda end: end.start(), default=None)


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _kinds(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows, alternatives included; none if it does not say.

    Args:
      schema: of an argument.
      root: of all arguments, to which it may refer.
    """
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type")
    found = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        entries = schema.get(key)
        for entry in entries if isinstance(entries, list) else []:
            found |= _kinds(entry, root)
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not found and isinstance(allowed, list):
        found = {kind for value in allowed for kind in _kinds_of(value)}
    match str(schema.get("$ref")).split("/"):
        case ["#", ("$defs" | "definitions") as group, name] if isinstance(root.get(group), Mapping):
            found |= _kinds(root[group].get(name), {})
    return found


def _kinds_of(value: Any) -> set[str]:
    return {"null"} if value is None else {"string"} if isinstance(value, str) else _KINDS[type(value)]


def _value(text: str, kinds: set[str]) -> Any:
    """What a text stands for: a value of one of these types if it can be read as one, or else the text."""
    word = text.strip()
    try:
        value, end = (_LITERALS[word], len(word)) if word in _LITERALS else read_json(word)
        write_arguments({"": value})
    except ValueError:
        return text
    if end < len(word) or isinstance(value, str):
        return text
    return value if not kinds or _kinds_of(value) & kinds else text
