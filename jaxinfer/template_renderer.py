"""Program: renders Jinja templates, one request a line of JSON; template_sandbox.py runs it, in a process that may die.

Owns: the Jinja environment of chat templates, what a broken template's error says.
Does not know: jaxinfer, which takes seconds to import; messages, checkpoints.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import traceback
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows
    resource = None

EXIT_MEMORY = 3
_COMPILED_NAME = "<template>"  # what jinja calls the file of a template made from a string
_MAX_MESSAGE_CHARS = 2000
_NUM_KEPT_TEMPLATES = 8


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what a model wrote, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own signature

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def make_environment() -> jinja2.Environment:
    """The environment of chat templates: immutable sandbox, trimmed blocks, loop controls, unescaped tojson.

    Returns:
      Jinja's ImmutableSandboxedEnvironment with, beside its own, the filter tojson (no HTML escapes; ensure_ascii,
      indent, separators, sort_keys as json.dumps), the function raise_exception(message) and the generation block.

    Source: transformers 5, utils/chat_template_utils.py (_cached_compile_jinja_template), whose output it reproduces.
    Deviation: the generation block is a scope, so that loop controls work inside it.

    Example:
      >>> make_environment().from_string("{{ {'a': '<é>'}|tojson }}").render()
      '{"a": "<é>"}'
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def main(arguments: list[str]) -> None:
    """Answers requests, one a line, until there are no more; leaves the interpreter when memory runs out.

    Args:
      arguments: the characters that a render may have, and its seconds of processor time.
    """
    rendered_chars, seconds = int(arguments[0]), float(arguments[1])
    compiled = functools.lru_cache(_NUM_KEPT_TEMPLATES)(make_environment().from_string)
    _send(b"")
    try:
        for line in sys.stdin.buffer:
            _limit_processor_time(seconds)
            _send(json.dumps(_answer(json.loads(line), compiled, rendered_chars)).encode())
    except MemoryError:
        os._exit(EXIT_MEMORY)


def _send(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _answer(request: dict[str, Any], compiled: Any, rendered_chars: int) -> dict[str, str]:
    now = datetime.fromisoformat(request["now"])
    names = {"strftime_now": lambda format: now.strftime(format)} | request["variables"]
    try:
        text = compiled(request["source"]).render(names)
    except MemoryError:
        raise
    except Exception as error:  # whatever a template can do wrong concerns this request only
        return {"error": _error_line(error)}
    if len(text) > rendered_chars:
        return {"error": f": the rendered text has {len(text)} characters, the limit is {rendered_chars}"}
    return {"text": text}


def _error_line(error: Exception) -> str:
    """What follows the template's origin: the line where it is known, the kind of error, the message."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == _COMPILED_NAME]
    if isinstance(error, jinja2.TemplateSyntaxError):
        lines = [error.lineno]
    kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
    message = " ".join(str(getattr(error, "message", None) or error)[:_MAX_MESSAGE_CHARS].split())
    return f"{f', line {lines[-1]}' if lines else ''}: {kind}{message}"


def _limit_processor_time(seconds: float) -> None:
    """Has the system end this process when it has computed for so long from now on.

    The one who asked ends a process that takes too long, mostly sooner; but nobody does once that one is gone.
    """
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
