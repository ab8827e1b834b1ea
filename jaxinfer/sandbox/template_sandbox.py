"""Has Jinja templates rendered that nobody has vetted: in a process of its own, with limits on size, time and memory.

A template is a program. Jinja's sandbox keeps it away from Python's insides, but not from looping for ever or asking
for a terabyte, often inside one C call that holds the interpreter (`10 ** 10 ** 9`, `"x" * 10 ** 11`) and that no
exception or tracing in this process could end. A process can be ended, and what it did is gone with it. The process is
a confined one (confined.py): it sees none of this process's environment variables, writes no files, and has no network
where the system allows that.

Owns: the process, its limits, the errors that name a template's origin.
Does not know: Jinja (template_renderer.py is the program that runs there), messages, checkpoints, tokenizers.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from jaxinfer.sandbox import confined
from jaxinfer.sandbox.template_renderer import EXIT_MEMORY

RENDERER = Path(__file__).with_name("template_renderer.py")
_EXIT_PROCESSOR_TIME = tuple(-getattr(signal, name) for name in ("SIGXCPU",) if hasattr(signal, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What a template may use.

    Args:
      source_chars: characters of the template.
      rendered_chars: characters of the text that it renders.
      seconds: wall-clock time of one render, compiling included. A process whose parent is gone ends itself after
        about as much processor time.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateTraits:
    """What can be read off a chat template without rendering it.

    Args:
      uses_tools: it reads the variable tools.
      reads_parts: it takes apart a message's content that is a list (template_renderer.reads_parts).
    """

    uses_tools: bool
    reads_parts: bool


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
        now = now or datetime.now()
        request = {"ask": "text", "source": source, "variables": dict(variables), "now": now.isoformat()}
        return self._answer(request, origin)["text"]

    def traits(self, source: str, *, origin: str) -> TemplateTraits:
        """What can be read off a template.

        Args:
          source: the template.
          origin: where the template is from, for error messages.

        Raises:
          ValueError: as render's, of a template that is broken or exceeds a limit.
        """
        return TemplateTraits(**self._answer({"ask": "traits", "source": source}, origin))

    def close(self) -> None:
        """Ends the process; a later render starts another."""
        self._end_process()
        self._process = None

    def _answer(self, request: Mapping[str, Any], origin: str) -> dict[str, Any]:
        num_chars, limit = len(request["source"]), self._limits.source_chars
        if num_chars > limit:
            raise ValueError(f"{origin}: the template has {num_chars} characters, the limit is {limit}")
        with self._lock:
            answer = self._ask(json.dumps(request).encode() + b"\n")
        if "error" in answer:
            raise ValueError(f"{origin}{answer['error']}")
        return answer

    def _ask(self, request: bytes) -> dict[str, Any]:
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
        limits = self._limits
        process = subprocess.Popen(
            confined.command(
                RENDERER, str(limits.rendered_chars), str(limits.seconds), limits={"RLIMIT_AS": limits.memory_bytes}
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=confined.environment(sys.path),
            start_new_session=True,  # Ctrl-C in a terminal is for this process only
        )
        self._process = process
        self._end_process = weakref.finalize(self, _end, process)
        cast(IO[bytes], process.stdout).readline()  # it is ready; starting it does not count as a template's time
        return process

    def _why_ended(self, exit_code: int, *, is_late: bool) -> str:
        limits = self._limits
        if exit_code == EXIT_MEMORY:
            return f"the template needs more than {limits.memory_bytes >> 20} MiB of memory"
        if is_late or exit_code in _EXIT_PROCESSOR_TIME:
            return f"the template takes more than {limits.seconds:g} s"
        return f"the process that renders the template ended with exit code {exit_code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:
        pass  # closes the pipes and waits
