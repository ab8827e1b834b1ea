"""The sandbox: Jinja as chat templates know it, and hostile templates that must end in time and in little memory."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxinfer.sandbox import template_sandbox
from jaxinfer.sandbox.template_sandbox import SandboxLimits, TemplateSandbox

TIGHT = SandboxLimits(source_chars=2000, rendered_chars=1000, seconds=0.5, memory_bytes=2**27)


@pytest.fixture(scope="module")
def sandbox():
    sandbox = TemplateSandbox(SandboxLimits(seconds=30))
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def tight():
    sandbox = TemplateSandbox(TIGHT)
    yield sandbox
    sandbox.close()


def render(sandbox: TemplateSandbox, source: str, **variables: object) -> str:
    return sandbox.render(source, variables, origin="here")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("  {% if true %}\n a\n  {% endif %}\nb", " a\nb"),
        ("{% for i in [1, 2, 3] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "2"),
        ("{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}", '{"b": "<é>", "a": [1, null, true]}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": 1, "b": "\\u00e9"}'),
        ("{{ [1, 2] | tojson(indent=1, separators=(';', ':')) }}", "[\n 1;\n 2\n]"),
        ("[{{ nothing }}{{ nothing is defined }}]", "[False]"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{% for i in [0, 1] %}{% generation %}{{ i }}{% break %}{% endgeneration %}{% endfor %}", "0"),
        ("[{{ ''.__class__ }}{{ ''['__class__'] }}]", "[]"),
        ("{{ '\\u65e5' ~ '🙂' }}", "日🙂"),
    ],
)
def test_render_as_chat_templates_expect(source, expected, sandbox) -> None:
    assert render(sandbox, source) == expected


def test_render_writes_the_date_of_the_call(sandbox) -> None:
    assert render(sandbox, "{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render(sandbox, "{{ strftime_now(format='%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n\n{% if %}", "here, line 3: TemplateSyntaxError: Expected an expression"),
        ("a\n{{ x.y.z }}", "here, line 2: UndefinedError: 'x' is undefined"),
        ("{{ raise_exception('two\nlines') }}", "here, line 1: two lines"),
        ("{{ raise_exception(5) }}", "here, line 1: 5"),
        ("{{ [].append(1) }}", "here, line 1: SecurityError: "),
        ("{{ ''.__class__.__mro__ }}", "here, line 1: SecurityError: "),
        ("{{ self.__init__.__globals__ }}", "here, line 1: SecurityError: "),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "here, line 1: SecurityError: "),
        ("{{ 1 / 0 }}", "here, line 1: ZeroDivisionError: division by zero"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "here, line 1: OverflowError: Range too big"),
        ("{% include 'other' %}", "here, line 1: TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "here, line 1: RecursionError: "),
        ("{{ " + "(" * 900 + "1" + ")" * 900 + " }}", "here: RecursionError: "),
    ],
)
def test_error_is_one_line_that_names_the_origin(source, message, sandbox) -> None:
    with pytest.raises(ValueError) as raised:
        render(sandbox, source)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


LOOPS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    ),
    "one endless C call": "{{ 10 ** (10 ** 9) > 1 }}",
    "loop inside a filter": "{% set r = range(100000) %}{{ ([r] * 100000) | map('sum') | sum }}",
}
BOMBS = {
    "repetition": "{{ ('x' * 10 ** 11) | length }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "replace": (
        "{% set n = namespace(x='a' * 9) %}{% for i in range(9) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}"
    ),
    "join": "{% set n = namespace(x='a' * 999) %}{% for i in range(9) %}{% set n.x = n.x.join(n.x) %}{% endfor %}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) | length }}",
    "format filter": "{{ '%0999999999d' | format(1) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "indent": "{{ 'a' | indent(10 ** 10, true) }}",
    "tojson": "{{ [1] | tojson(indent=10 ** 10) }}",
    "list of numbers": "{{ ([0] * 10 ** 10) | length }}",
    "lists of numbers": "{{ ([range(100000)] * 10000) | map('list') | list | length }}",
    "repeated output": "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_endless_template_ends_in_time(source, tight) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"here: the template takes more than 0\.5 s"):
        render(tight, source)
    assert time.monotonic() - started < 60  # for ever, otherwise
    assert render(tight, "{{ a }}", a=1) == "1"


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_memory_bomb_is_refused(source, tight) -> None:
    with pytest.raises(
        ValueError, match=r"here: the template (needs more than 128 MiB of memory|takes more than 0\.5 s)"
    ):
        render(tight, source)
    assert render(tight, "{{ a }}", a=1) == "1"


def test_sizes_are_limited(tight) -> None:
    assert len(render(tight, "{{ 'x' * 1000 }}")) == 1000
    with pytest.raises(ValueError, match="here: the rendered text has 1001 characters, the limit is 1000"):
        render(tight, "{{ 'x' * 1001 }}")
    with pytest.raises(ValueError, match="here: the template has 2001 characters, the limit is 2000"):
        render(tight, "x" * 2001)


def test_error_message_is_cut(sandbox) -> None:
    with pytest.raises(ValueError) as raised:
        render(sandbox, "{{ raise_exception('x' * 10 ** 6) }}")
    assert len(str(raised.value)) < 2100


def test_render_from_many_threads(sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: render(sandbox, "{{ a }}{{ a }}", a=i), range(64)))
    assert texts == [f"{i}{i}" for i in range(64)]


def test_render_after_the_process_was_lost_starts_another() -> None:
    sandbox = TemplateSandbox()
    assert render(sandbox, "a") == "a"
    sandbox._process.kill()
    sandbox._process.wait()
    assert render(sandbox, "b") == "b"
    process = sandbox._process
    sandbox.close()
    sandbox.close()
    assert process.returncode is not None
    assert render(sandbox, "c") == "c"
    process = sandbox._process
    del sandbox
    assert process.returncode is not None


def test_process_lost_amid_a_render_is_an_error() -> None:
    sandbox = TemplateSandbox(SandboxLimits(seconds=30))
    render(sandbox, "a")
    timer = threading.Timer(0.2, sandbox._process.kill)
    timer.start()
    with pytest.raises(ValueError, match="here: the process that renders the template ended with exit code -9"):
        render(sandbox, LOOPS["nested loops"])
    timer.join()
    assert render(sandbox, "b") == "b"
    sandbox.close()


@pytest.mark.usefixtures("interruptible")
def test_interrupted_wait_does_not_give_the_next_one_a_wrong_answer(sandbox) -> None:
    render(sandbox, "a")
    # A real signal: what a terminal's Ctrl-C is, and what ends a wait for a pipe.
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render(sandbox, LOOPS["nested loops"])
    timer.join()
    assert render(sandbox, "b") == "b"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and another process's limits")
def test_process_has_no_secrets_and_every_limit(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    sandbox = TemplateSandbox(SandboxLimits(seconds=30, memory_bytes=2**28))
    render(sandbox, "a")
    process = sandbox._process

    def limit(name: str) -> int:
        return resource.prlimit(process.pid, getattr(resource, f"RLIMIT_{name}"))[0]

    assert b"secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert [limit(name) for name in ("AS", "FSIZE", "NOFILE", "CORE", "CPU")] == [2**28, 0, 16, 0, 31]
    while limit("CPU") == 31:  # what earlier renders took is no part of the next one's time
        render(sandbox, "{% for i in range(99999) %}{% for j in range(20) %}{% endfor %}{% endfor %}")
    assert limit("CPU") == 32 and sandbox._process is process
    sandbox.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_process_that_nobody_waits_for_ends_by_itself(monkeypatch) -> None:
    sandbox = TemplateSandbox(SandboxLimits(seconds=0.01))
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)  # as if this process were gone
    with pytest.raises(ValueError, match=r"here: the template takes more than 0\.01 s"):
        render(sandbox, LOOPS["nested loops"])
    sandbox.close()


def test_process_imports_nothing_of_the_package() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print([m for m in sys.modules if m.startswith('jax')])"
    command = [sys.executable, "-P", "-c", code, str(template_sandbox.RENDERER)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("field", ["source_chars", "rendered_chars", "seconds", "memory_bytes"])
def test_limits_are_positive(field) -> None:
    with pytest.raises(ValueError, match=f"{field} must be > 0, got 0"):
        SandboxLimits(**{field: 0})
