"""Takes a reply apart while it grows.

Owns: what of the text is decided already, and what has to be held back since a marker may have begun.
Does not know: how families write calls (calls.py), requests.

A call is given out when it is whole. A client therefore never gets half the arguments of a call that the model did not
finish, and text that begins like a call but is none arrives as content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from jaxinfer.serve.replies.calls import CallSyntax, Tools
from jaxinfer.serve.replies.formats import ReplyFormat
from jaxinfer.serve.replies.parts import Content, Part, Reasoning


class ReplyParser:
    """Gives out the parts of one reply.

    Args:
      format: how the model writes its replies.
      prompt: the rendered prompt, which may have begun the reply's thoughts; its end suffices.
      continued: as ReplyFormat.closer_after's.
      tools: those that were offered; without any, calls are content.
      max_calls: calls that are given out; what follows the last of them is left out. None is any number.

    Example:
      >>> from jaxinfer.serve.replies.formats import FORMATS
      >>> parser = ReplyParser(FORMATS["hermes"], tools={"now": {}})
      >>> parser.feed('<think>Hm.</think>See: <tool_call>{"name": "now", "argum')
      [Reasoning(text='Hm.'), Content(text='See:')]
      >>> parser.feed('ents": {}}</tool_call>'), parser.end()
      ([ToolCall(name='now', arguments='{}')], [])
    """

    def __init__(
        self,
        format: ReplyFormat,
        *,
        prompt: str = "",
        continued: str = "",
        tools: Tools = MappingProxyType({}),
        max_calls: int | None = None,
    ):
        self._thoughts = format.thoughts
        self._tools = tools
        self._calls = format.calls if self._tools else None
        self._openers = () if self._calls is None else self._calls.openers
        self._strips = self._calls is not None and self._calls.strips
        self._held = self._added = ""
        self._closer = format.closer_after(prompt, continued=continued)
        """The marker at the end of the thoughts that the text is in; None if it is in none."""
        self._opener: str | None = None
        """The marker at the beginning of the call that the text is in."""
        self._is_at_start = True
        """Whether nothing but thoughts came so far."""
        self._is_fresh = self._closer is not None
        """Whether white space at the beginning of what comes is to be left out."""
        self._has_called = self._is_cut_off = False
        self._calls_left = sys.maxsize if max_calls is None else max_calls
        self._gap = ""
        """White space before a marker, which is content if no call follows."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are decided once this text has been added."""
        self._held += text
        self._added = text
        return list(self._advance(ended=False))

    def end(self, *, cut_off: bool = False) -> list[Part]:
        """The parts that are left when no more text comes.

        Args:
          cut_off: whether the model had more to say. A call that it has not finished is then left out; otherwise what
            began like a call and is none is content.
        """
        self._is_cut_off = cut_off
        return list(self._advance(ended=True))

    def _advance(self, *, ended: bool) -> Iterator[Part]:
        goes_on = self._calls_left > 0
        while goes_on:
            if self._closer is not None:
                goes_on = yield from self._read_thoughts(self._closer, ended=ended)
            elif self._calls is not None and self._opener is not None:
                goes_on = yield from self._read_call(self._calls, self._opener, ended=ended)
            else:
                goes_on = yield from self._read_content(ended=ended)

    def _read_thoughts(self, closer: str, *, ended: bool) -> Iterator[Part]:
        text, found, rest = self._held.partition(closer)
        if not found and not ended:
            text, rest = _before_partial(text, (closer,), strips=True)
        text = text.rstrip() if found or ended else text
        if self._is_fresh:
            text = text.lstrip()
        if text:
            yield Reasoning(text)
        self._held, self._is_fresh = rest, bool(found) or (self._is_fresh and not text)
        if found:
            self._closer = None
        return bool(found)

    def _read_content(self, *, ended: bool) -> Iterator[Part]:
        if self._is_fresh:
            self._held = self._held.lstrip()
        if self._is_at_start and self._begins(ended=ended):
            return self._closer is not None or self._opener is not None
        place, opener = min(((place, x) for x in self._openers if (place := self._held.find(x)) >= 0), default=(-1, ""))
        if opener:
            text, rest = self._held[:place], self._held[place + len(opener) :]
            self._opener, self._added, self._gap = opener, rest, text[len(text.rstrip()) :] if self._strips else ""
            text = text.removesuffix(self._gap)
        elif ended:
            text, rest = self._held.rstrip() if self._strips and self._has_called else self._held, ""
        else:
            text, rest = _before_partial(self._held, self._openers, strips=self._strips)
        if text:
            self._is_at_start = self._is_fresh = False
            yield Content(text)
        self._held = rest
        return bool(opener)

    def _begins(self, *, ended: bool) -> bool:
        """Looks at the beginning of a reply; True if it is no content, or cannot be told yet."""
        text = self._held.lstrip()
        if not text:
            return not ended
        for opener, closer in self._thoughts:
            if text.startswith(opener):
                self._held, self._closer, self._is_fresh = text[len(opener) :], closer, True
                return True
            if opener.startswith(text) and not ended:
                return True
        if self._calls is not None and text.startswith(self._calls.beginnings):
            self._held = self._added = text
            self._opener = ""
            return True
        return False

    def _read_call(self, calls: CallSyntax, opener: str, *, ended: bool) -> Iterator[Part]:
        reading = calls.read(self._held, self._added, tools=self._tools, ended=ended)
        if reading is None and not ended:
            return False
        self._opener = None
        self._is_at_start = False
        if reading is not None and reading.calls:
            yield from reading.calls[: self._calls_left]
            self._calls_left -= len(reading.calls)
            if self._calls_left <= 0:
                return False
            self._held = self._held[reading.length :]
            self._has_called, self._is_fresh = True, False
        elif opener and ended and (self._is_cut_off or not self._held.strip()):
            self._held = ""
        elif opener:
            yield Content(self._gap + opener)
        return True


def _before_partial(text: str, markers: Sequence[str], *, strips: bool) -> tuple[str, str]:
    """Splits text before an end of it with which a marker may begin, and with `strips` before white space there."""
    place = len(text)
    for marker in markers:
        start = max(len(text) - len(marker) + 1, 0)
        while (start := text.find(marker[0], start)) >= 0:
            if marker.startswith(text[start:]):
                place = min(place, start)
                break
            start += 1
    if strips:
        place = len(text[:place].rstrip())
    return text[:place], text[place:]
