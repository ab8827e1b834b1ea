"""The text of each field in the docstring of a class of settings.

Owns: reading the section "Args:".
Does not know: who shows the texts.
"""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r" {2}(?P<names>\w+(?:, \w+)*): (?P<text>.*)")


def field_help(settings: type) -> dict[str, str]:
    """Returns the text of each field in the "Args:" section of a class's docstring.

    Example:
      >>> from jaxinfer.config.engine_config import EngineConfig
      >>> field_help(EngineConfig)["page_size"]
      'tokens in one KV page; a power of two, at least 8.'
    """
    section = inspect.cleandoc(settings.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            names = entry["names"].split(", ")
        for name in names:
            texts[name] = entry["text"] if entry else f"{texts[name]} {line.strip()}"
    return texts
