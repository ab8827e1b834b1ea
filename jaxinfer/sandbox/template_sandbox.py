"""TemplateSandbox: renders untrusted Jinja templates in a child process, with limits on size, time and memory.

A template is a program. Jinja's sandbox keeps it away from Python's internals, but does not stop it from looping for
ever or asking for a terabyte of memory, often inside one C call (`10 ** 10 ** 9`, `"x" * 10 ** 11`) that no exception
raised in the same process can interrupt. A separate process can be killed. It is confined (confined.py): it sees none
of this process's secrets, writes no files, and has no network where the system allows that.

Owns: the child process, its limits, the errors that name a template's origin.
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

RENDERER = Path(__file__).with_name("template_renderer.py")
_EXIT_MEMORY = 3
_EXIT_PROCESSOR_TIME = tuple(-getattr(signal, name) for name in ("SIGXCPU",) if hasattr(signal, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """The most that a template may use.

    Args:
      source_chars: length of the template in characters.
      rendered_chars: length of the rendered text in characters.
      seconds: wall-clock time of one render, compiling the template included. If the parent has died, the child ends
        itself after about as much processor time.
      memory_bytes: address space of the child process, of which Python itself takes 25 MB. Enforced on systems with
        RLIMIT_AS (Linux); on others only the time of a render is limited.

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
    """What can be told about a chat template without rendering it.

    Args:
      uses_tools: whether it reads the variable `tools`.
      reads_parts: whether it can handle a content that is a list of parts (template_renderer.reads_parts).
    """

    uses_tools: bool
    reads_parts: bool


class TemplateSandbox:
    """Renders templates in one child process, which starts at the first render; safe to use from several threads.

    If a template exceeds the limit of time or memory, the process is ended, and the next render starts another.

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
        """Renders a template.

        Args:
          source: the template's text.
          variables: the template's variables by name, as JSON data. The template gets a copy.
          origin: the file or argument that the template comes from, for error messages.
          now: the time that the template's strftime_now formats; None takes the time of the call.

        Raises:
          ValueError: the template is broken, calls raise_exception, does something that Jinja's sandbox forbids, or
            exceeds a limit. The message is one line that begins with the origin.
        """
        now = now or datetime.now()
        request = {"ask": "text", "source": source, "variables": dict(variables), "now": now.isoformat()}
        return self._answer(request, origin)["text"]

    def traits(self, source: str, *, origin: str) -> TemplateTraits:
        """Examines a template without rendering it.

        Args:
          source: the template's text.
          origin: the file or argument that the template comes from, for error messages.

        Raises:
          ValueError: the template is broken or exceeds a limit; the message is as render's.
        """
        return TemplateTraits(**self._answer({"ask": "traits", "source": source}, origin))

    def close(self) -> None:
        """Ends the child process; a later render starts another."""
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

        def end_late_process() -> None:  # killed from outside, so that even an endless C call ends
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
        except BaseException:  # after Ctrl-C the answer still comes and would be taken for that of the next request
            self.close()
            raise
        finally:
            deadline.cancel()
        if not answer.endswith(b"\n"):
            exit_code = process.wait()
            self.close()
            return {"error": f": {self._why_ended(exit_code, is_late=late.is_set())}"}
        if late.is_set():  # the answer came just before the process was killed
            self.close()
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        limits = self._limits
        process = subprocess.Popen(
            confined.command(
                RENDERER,
                str(limits.rendered_chars),
                str(limits.seconds),
                str(_EXIT_MEMORY),
                limits={"RLIMIT_AS": limits.memory_bytes},
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=confined.environment(sys.path),
            start_new_session=True,  # so that Ctrl-C in a terminal does not reach the child
        )
        self._process = process
        self._end_process = weakref.finalize(self, _end, process)
        cast(IO[bytes], process.stdout).readline()  # waits until it is ready: its start is not part of a render's time
        return process

    def _why_ended(self, exit_code: int, *, is_late: bool) -> str:
        limits = self._limits
        if exit_code == _EXIT_MEMORY:
            return f"the template needs more than {limits.memory_bytes >> 20} MiB of memory"
        if is_late or exit_code in _EXIT_PROCESSOR_TIME:
            return f"the template takes more than {limits.seconds:g} s"
        return f"the process that renders the template ended with exit code {exit_code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:
        pass  # closes the pipes and waits
