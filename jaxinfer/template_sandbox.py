"""Renders Jinja templates that nobody has vetted: in a process of its own, with limits on size, time and memory.

A template is a program. Jinja's sandbox keeps it away from Python's insides, but not from looping for ever or asking
for a terabyte, often inside one C call that holds the interpreter (`10 ** 10 ** 9`, `"x" * 10 ** 11`) and that no
exception or tracing in this process could end. A process can be ended, and what it did is gone with it.

Owns: the Jinja environment, the process, its limits, the errors.
Does not know: messages, checkpoints, tokenizers. Imports nothing of the package: the process runs this file alone and
starts in about a tenth of a second.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import IO, Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows
    resource = None

_EXIT_MEMORY = 3
_COMPILED_NAME = "<template>"  # what jinja calls the file of a template made from a string
_MAX_MESSAGE_CHARS = 2000
_NUM_KEPT_TEMPLATES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What a template may use.

    Args:
      source_chars: characters of the template.
      rendered_chars: characters of the text that it renders.
      seconds: wall-clock time of one render, compiling included.
      memory_bytes: address space of the process, Python's own 25 MB included. Enforced where the system knows
        RLIMIT_AS (Linux); elsewhere only the time limits a render.

    Raises:
      ValueError: a limit that is not positive.
    """

    source_chars: int = 2**18
    rendered_chars: int = 2**24
    seconds: float = 5.0
    memory_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value!r}")


class TemplateSandbox:
    """One process that renders templates, started with the first one; safe to use from several threads.

    A template that exceeds a limit costs the process, and the next render starts another.

    Args:
      limits: of each render.

    Example:
      >>> sandbox = TemplateSandbox()
      >>> sandbox.render("{% for w in words %}{{ w|upper }} {% endfor %}", {"words": ["a", "b"]}, origin="example")
      'A B '
      >>> sandbox.close()
    """

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self._limits = limits or SandboxLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end_process = weakref.finalize(self, lambda: None)

    def render(self, source: str, variables: Mapping[str, Any], *, origin: str, now: datetime | None = None) -> str:
        """The text of a template.

        Args:
          source: the template.
          variables: by name; JSON data. The template sees a copy.
          origin: where the template is from, for error messages.
          now: what the template's strftime_now formats; None takes the time of the call.

        Raises:
          ValueError: in one line that begins with the origin: the template is broken, refuses what it was given
            (raise_exception), does what the sandbox forbids, or exceeds a limit.
        """
        limits = self._limits
        if len(source) > limits.source_chars:
            raise ValueError(f"{origin}: the template has {len(source)} characters, the limit is {limits.source_chars}")
        now = now or datetime.now()
        request = {"source": source, "variables": dict(variables), "now": now.isoformat()}
        with self._lock:
            answer = self._ask(json.dumps(request).encode() + b"\n")
        if "error" in answer:
            raise ValueError(f"{origin}{answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """Ends the process; a later render starts another."""
        self._end_process()
        self._process = None

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._running()
        requests, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        late = threading.Event()

        def end_late_process() -> None:  # from here, which also ends one endless C call
            late.set()
            process.kill()

        deadline = threading.Timer(self._limits.seconds, end_late_process)
        deadline.daemon = True
        deadline.start()
        try:
            requests.write(request)
            requests.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # Ctrl-C: an answer that nobody waits for must not meet the next question
            self.close()
            raise
        finally:
            deadline.cancel()
        if not answer.endswith(b"\n"):
            exit_code = process.wait()
            self.close()
            return {"error": f": {self._why_ended(exit_code, is_late=late.is_set())}"}
        if late.is_set():  # just in time, but the process is gone
            self.close()
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # The modules that this process can import, and no others (-P: not the siblings of this file).
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(asdict(self._limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for this process only
        )
        self._process = process
        self._end_process = weakref.finalize(self, _end, process)
        cast(IO[bytes], process.stdout).readline()  # it is ready; starting it does not count as a template's time
        return process

    def _why_ended(self, exit_code: int, *, is_late: bool) -> str:
        limits = self._limits
        if exit_code == _EXIT_MEMORY:
            return f"the template needs more than {limits.memory_bytes >> 20} MiB of memory"
        if is_late:
            return f"the template takes more than {limits.seconds:g} s"
        return f"the process that renders the template ended with exit code {exit_code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:
        pass  # closes the pipes and waits


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


def _serve(limits: SandboxLimits) -> None:
    """Answers requests, one a line, until there are no more; leaves the interpreter where a limit is exceeded."""
    compiled = functools.lru_cache(_NUM_KEPT_TEMPLATES)(make_environment().from_string)
    _send(b"")
    try:
        for line in sys.stdin.buffer:
            _send(json.dumps(_answer(json.loads(line), compiled, limits)).encode())
    except MemoryError:
        os._exit(_EXIT_MEMORY)


def _send(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _answer(request: dict[str, Any], compiled: Any, limits: SandboxLimits) -> dict[str, str]:
    now = datetime.fromisoformat(request["now"])
    names = {"strftime_now": lambda format: now.strftime(format)} | request["variables"]
    try:
        text = compiled(request["source"]).render(names)
    except MemoryError:
        raise
    except Exception as error:  # whatever a template can do wrong concerns this request only
        return {"error": _error_line(error)}
    if len(text) > limits.rendered_chars:
        return {"error": f": the rendered text has {len(text)} characters, the limit is {limits.rendered_chars}"}
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


def _limit_memory(num_bytes: int) -> None:
    if resource is not None:
        with contextlib.suppress(ValueError, OSError):  # a system without such a limit, or with a lower one
            resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


if __name__ == "__main__":
    _limits = SandboxLimits(**json.loads(sys.argv[1]))
    _limit_memory(_limits.memory_bytes)
    _serve(_limits)
