"""The parts of a reply, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More text of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call of a tool.

    Args:
      name: the tool.
      arguments: a JSON object, as text.
    """

    name: str
    arguments: str


Part = Reasoning | Content | ToolCall
