"""What the tests let clients ask for: short answers, which a grammar makes the tiny model give."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
"""A call of the tool weather, as the model writes it."""


class City(BaseModel):
    """A city and whether it rains there."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    rains: bool


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather in a city.

    Args:
      city: where.
    """
    return f"sun in {city}"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
"""weather, in the form of OpenAI's chat completions."""
