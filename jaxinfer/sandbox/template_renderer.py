"""A program that renders Jinja templates; template_sandbox.py runs it in a process that may be killed.

It reads one request per line of standard input, as JSON, and writes one answer per line to standard output.

Owns: the Jinja environment of chat templates; what can be told about a template without rendering it; the error message
of a broken template.
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
import jinja2.meta
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes

try:
    import resource
except ImportError:  # Windows
    resource = None

_COMPILED_NAME = "<template>"  # what jinja calls the file of a template made from a string
_MAX_MESSAGE_CHARS = 2000
_NUM_KEPT_TEMPLATES = 8
_FILTERS_OF_ENTRIES = ("map", "selectattr", "rejectattr", "groupby")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the model's own words for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own signature

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


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
    environment.globals["raise_exception"] = _raise_exception  # pyrefly: ignore[unsupported-operation]
    return environment


def main(arguments: list[str]) -> None:
    """Answers requests until standard input ends, or memory runs out.

    Args:
      arguments: the limit of characters of a rendered text, the limit of a render in seconds of processor time, and the
        exit code that says that memory ran out.
    """
    rendered_chars, seconds, exit_memory = int(arguments[0]), float(arguments[1]), int(arguments[2])
    environment = make_environment()
    compiled = functools.lru_cache(_NUM_KEPT_TEMPLATES)(environment.from_string)
    _send(b"")
    try:
        for line in sys.stdin.buffer:
            _limit_processor_time(seconds)
            request = json.loads(line)
            answer = _traits(request, environment) if request["ask"] == "traits" else _text(request, compiled)
            if len(answer.get("text", "")) > rendered_chars:
                num_chars = len(answer["text"])
                answer = {"error": f": the rendered text has {num_chars} characters, the limit is {rendered_chars}"}
            _send(json.dumps(answer).encode())
    except MemoryError:
        os._exit(exit_memory)


def _send(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _text(request: dict[str, Any], compiled: Any) -> dict[str, Any]:
    now = datetime.fromisoformat(request["now"])
    names = {"strftime_now": lambda format: now.strftime(format)} | request["variables"]
    try:
        return {"text": compiled(request["source"]).render(names)}
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything; it must fail this request only
        return {"error": _error_line(error)}


def _traits(request: dict[str, Any], environment: jinja2.Environment) -> dict[str, Any]:
    try:
        tree = environment.parse(request["source"])
        names = jinja2.meta.find_undeclared_variables(tree)
        return {"uses_tools": "tools" in names, "reads_parts": reads_parts(tree)}
    except MemoryError:
        raise
    except Exception as error:
        return {"error": _error_line(error)}


def reads_parts(tree: nodes.Template) -> bool:
    """Whether a template can handle a message's content that is a list of parts.

    It can if it loops over a content, uses map, selectattr, rejectattr or groupby on it, or reads the text or type of
    one of its entries (content[0].text). The content may reach that place through a variable, a macro's parameter, a
    slice or a filter. The result of a method, such as content.split("\\n"), does not count as content.

    Source: vLLM, entrypoints/chat_utils.py (_detect_content_format). Deviations: vLLM recognises only loops, and does
    not look into macros.

    Example:
      >>> parse = make_environment().parse
      >>> reads_parts(parse("{% for part in messages[0].content %}{{ part.text }}{% endfor %}"))
      True
      >>> reads_parts(parse("{% for message in messages %}{{ message.content + '!' }}{% endfor %}"))
      False
    """
    names = _content_names(tree)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    filters = any(
        entry.name in _FILTERS_OF_ENTRIES and _is_content(entry.node, names) for entry in tree.find_all(nodes.Filter)
    )
    accesses = tree.find_all((nodes.Getattr, nodes.Getitem))
    entries = [access.node for access in accesses if _key(access) in ("text", "type")]
    return loops or filters or any(isinstance(e, nodes.Getitem) and _is_content(e.node, names) for e in entries)


def _content_names(tree: nodes.Template) -> frozenset[str]:
    """Names of the variables and macro parameters that hold a message's content anywhere in the template."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    bindings = [(entry.target, entry.node) for entry in tree.find_all(nodes.Assign)]
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is not None:
            bindings += zip(macro.args, call.args, strict=False)
    names: frozenset[str] = frozenset()
    while True:
        bound = {
            target.name for target, value in bindings if isinstance(target, nodes.Name) and _is_content(value, names)
        }
        if bound <= names:
            return names
        names |= bound


def _is_content(node: Any, names: frozenset[str]) -> bool:
    """Whether an expression is a message's content, a slice of it, or a choice of values one of which is content.

    Args:
      node: the expression.
      names: the variables known to hold content.
    """
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr() | nodes.Getitem() if _key(node) == "content":
            return True
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
        case nodes.Filter() | nodes.Getitem(arg=nodes.Slice()):
            return _is_content(node.node, names)
        case nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
        case nodes.Or() | nodes.And():
            return _is_content(node.left, names) or _is_content(node.right, names)
    return False


def _key(access: Any) -> Any:
    """The name in value.name and in value["name"]; None for any other index."""
    if isinstance(access, nodes.Getattr):
        return access.attr
    return access.arg.value if isinstance(access.arg, nodes.Const) else None


def _error_line(error: Exception) -> str:
    """The error message after the template's origin, such as ", line 3: UndefinedError: 'x' is undefined"."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == _COMPILED_NAME]
    if isinstance(error, jinja2.TemplateSyntaxError):
        lines = [error.lineno]
    kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
    message = " ".join(str(getattr(error, "message", None) or error)[:_MAX_MESSAGE_CHARS].split())
    return f"{f', line {lines[-1]}' if lines else ''}: {kind}{message}"


def _limit_processor_time(seconds: float) -> None:
    """Makes the system end this process after that much more processor time.

    Usually the parent kills a process that takes too long before this limit is reached. The limit is for the case that
    the parent has died.
    """
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
