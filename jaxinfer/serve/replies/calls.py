"""How families of models write calls of tools.

Owns: reading a call that began, and telling one that is not complete yet from one that is none.
Does not know: where in a reply calls are (parser.py).

Source: the chat templates of Qwen 3, Llama 3 and 4, Mistral's tokenizers v3 to v13, and Gemma 4.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxinfer.serve.replies.json_text import read_json, unique, write_arguments
from jaxinfer.serve.replies.parts import ToolCall

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of the arguments of the tools that were offered, by the tools' names."""
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read.

    Args:
      calls: the calls; none if the text is no call.
      length: the characters that they take.
    """

    calls: tuple[ToolCall, ...]
    length: int


NO_CALL = Reading((), 0)


class CallSyntax(Protocol):
    """How a family writes calls."""

    @property
    def openers(self) -> tuple[str, ...]:
        """Markers before a call, anywhere in the content."""
        ...

    @property
    def beginnings(self) -> tuple[str, ...]:
        """What a reply begins with that may be a call without a marker."""
        ...

    @property
    def strips(self) -> bool:
        """Whether white space before a call belongs to it."""
        ...

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """Reads the calls at the beginning of a text.

        Args:
          text: what came behind the opener so far.
          added: the end of the text that is new since the last time.
          tools: those that were offered.
          ended: whether nothing more comes.

        Returns:
          None if it cannot be told yet, or if the text has ended and no call is complete.
        """
        ...


@dataclass(frozen=True, slots=True)
class HermesCalls:
    """A JSON object with name and arguments between two markers."""

    openers: tuple[str, ...] = ("<tool_call>",)
    closer: str = "</tool_call>"
    beginnings: tuple[str, ...] = ()
    strips: bool = True

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """See CallSyntax."""
        if not ended and ">" not in added:
            return None
        try:
            value, end = read_json(text)
        except ValueError:
            return None
        calls = _calls(value)
        if calls is None:
            return None
        rest = text[end:].lstrip()
        if rest.startswith(self.closer):
            return Reading(calls, len(text) - len(rest) + len(self.closer))
        return Reading(calls, len(text)) if ended and self.closer.startswith(rest) else None


@dataclass(frozen=True, slots=True)
class MistralCalls:
    """A marker and a JSON list of calls, or a marker, a name, another marker and the arguments."""

    openers: tuple[str, ...] = ("[TOOL_CALLS]",)
    beginnings: tuple[str, ...] = ()
    strips: bool = False
    _head = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?(?=\s*\{)")

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """See CallSyntax."""
        if not ended and "]" not in added and "}" not in added:
            return None
        try:
            if text.lstrip().startswith("["):
                value, end = read_json(text)
                calls = _calls(value)
                return None if calls is None else Reading(calls, end)
            head = self._head.match(text)
            if head is None:
                return None
            value, end = read_json(text, head.end())
        except ValueError:
            return None
        return Reading((ToolCall(head[1], write_arguments(value)),), end)


@dataclass(frozen=True, slots=True)
class LlamaCalls:
    """JSON objects with name and parameters, or a list of calls as in Python, as a reply of their own."""

    openers: tuple[str, ...] = ("<|python_tag|>", "<|python_start|>")
    beginnings: tuple[str, ...] = ("{", "[")
    strips: bool = False
    _list_start = re.compile(r"\s*\[\s*([\w.]*)\s*(.?)", re.DOTALL)

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """See CallSyntax."""
        if not ended and len(text) > 64 and not any(sign in added for sign in "}]>"):
            return None
        if text.lstrip().startswith("{"):
            return self._objects(text, tools, ended=ended)
        if text.lstrip().startswith("["):
            return self._list(text, tools, ended=ended)
        return self._expression(text, text.strip()) if ended else None

    def _objects(self, text: str, tools: Tools, *, ended: bool) -> Reading | None:
        calls: list[ToolCall] = []
        end = 0
        while True:
            try:
                value, end = read_json(text, end)
            except ValueError:
                return None
            found = _calls(value)
            if found is None or any(call.name not in tools for call in found):
                return NO_CALL
            calls += found
            rest = text[end:].lstrip()
            if not rest.startswith(";"):
                return Reading(tuple(calls), end) if ended or rest else None
            end = len(text) - len(rest) + 1

    def _list(self, text: str, tools: Tools, *, ended: bool) -> Reading | None:
        start = self._list_start.match(text)
        if start is not None and start[2] and (start[2] != "(" or start[1] not in tools):
            return NO_CALL
        text, marker, _ = text.partition("<|python_end|>")
        return self._expression(text + marker, text.strip()) if ended or marker else None

    def _expression(self, text: str, source: str) -> Reading | None:
        """Calls written in Python, such as [f(a=1), g()] or f.call(a=1)."""
        try:
            body = ast.parse(source, mode="eval").body
            entries = body.elts if isinstance(body, ast.List) else [body]
            calls = tuple(_python_call(entry) for entry in entries)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None
        return Reading(calls, len(text))


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """`call:name{key:value,..}` between two markers, where a third one stands for a quotation mark."""

    opener: str = "<|tool_call>"
    closer: str = "<tool_call|>"
    quote: str = '<|"|>'
    beginnings: tuple[str, ...] = ()
    strips: bool = False

    @property
    def openers(self) -> tuple[str, ...]:
        """See CallSyntax."""
        return (self.opener,)

    def read(self, text: str, added: str, *, tools: Tools, ended: bool) -> Reading | None:
        """See CallSyntax."""
        if not ended and ">" not in added:
            return None
        try:
            reader = _GemmaReader(text, self.quote)
            reader.take("call:")
            name = reader.match(_NAME)
            arguments = write_arguments(reader.value())
            end = reader.place
        except (ValueError, RecursionError):
            return None
        rest = text[end:].lstrip()
        if rest.startswith(self.closer):
            return Reading((ToolCall(name, arguments),), len(text) - len(rest) + len(self.closer))
        return Reading((ToolCall(name, arguments),), len(text)) if ended and self.closer.startswith(rest) else None


class _GemmaReader:
    """Reads values in Gemma's notation from a place of a text on."""

    _KEY = re.compile(r"[^:{}\[\],]+")
    _BARE = re.compile(r"[^{}\[\],]+")

    def __init__(self, text: str, quote: str):
        self.text, self.quote, self.place = text, quote, 0

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.place)
        if found is None:
            raise ValueError(f"expected {pattern.pattern} at {self.place}")
        self.place = found.end()
        return found[0].strip()

    def starts(self, sign: str) -> bool:
        """Takes a sign, and white space before it, if it comes next."""
        place = self.place
        while self.text[place : place + 1].isspace():
            place += 1
        if self.text.startswith(sign, place):
            self.place = place + len(sign)
            return True
        return False

    def take(self, sign: str) -> None:
        if not self.starts(sign):
            raise ValueError(f"expected {sign!r} at {self.place}")

    def string(self) -> str:
        end = self.text.index(self.quote, self.place)
        found, self.place = self.text[self.place : end], end + len(self.quote)
        return found

    def value(self) -> Any:
        if self.starts(self.quote):
            return self.string()
        if self.starts("{"):
            return dict(self.entries("}", self.entry))
        if self.starts("["):
            return self.entries("]", self.value)
        bare = self.match(self._BARE)
        try:
            return read_json(bare)[0] if read_json(bare)[1] == len(bare) else bare
        except ValueError:
            return bare

    def entries(self, closer: str, read: Any) -> list[Any]:
        found: list[Any] = []
        while not self.starts(closer):
            if found:
                self.take(",")
            found.append(read())
        return found

    def entry(self) -> tuple[str, Any]:
        key = self.string() if self.starts(self.quote) else self.match(self._KEY)
        self.take(":")
        return key, self.value()


def _calls(value: Any) -> tuple[ToolCall, ...] | None:
    """Calls from what a model wrote in JSON: an object or a list of them; None if it is no call."""
    try:
        return tuple(_call(entry) for entry in (value if isinstance(value, list) and value else [value]))
    except ValueError:
        return None


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call is an object with a name")
    arguments = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):  # some models write the arguments' JSON into a string
        arguments = read_json(arguments)[0]
    return ToolCall(value["name"], write_arguments(arguments or {}))


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or any(entry.arg is None for entry in node.keywords):
        raise ValueError("a call names all its arguments")
    name = ast.unparse(node.func).removesuffix(".call")
    values = unique([(str(entry.arg), _literal(entry.value)) for entry in node.keywords])
    return ToolCall(name, write_arguments(values))


_LITERALS = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _LITERALS:
        return _LITERALS[node.id]
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)
    return value
