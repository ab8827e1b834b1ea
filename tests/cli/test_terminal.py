"""Reading messages from a real (pseudo) terminal: editing, history, pasted text, with and without readline."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from jaxinfer.cli import terminal

pty = pytest.importorskip("pty")

# The module alone, for the package takes seconds to import.
SCRIPT = """
import importlib.util, sys
if "plain" in sys.argv:
    sys.modules["readline"] = None
spec = importlib.util.spec_from_file_location("terminal", sys.argv[1])
terminal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(terminal)
terminal.enable_line_editing()
with open(int(sys.argv[2]), "w") as messages:
    while (message := terminal.read_message()) is not None:
        print(repr(message), file=messages, flush=True)
"""


@contextmanager
def at_terminal(*options: str):
    """What a person does at a terminal: types text, sees the message that was read."""
    ours, theirs = pty.openpty()
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, terminal.__file__, str(writing), *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,  # where Python without readline writes the prompt
        pass_fds=[writing],
        env=os.environ | {"TERM": "xterm", "INPUTRC": os.devnull},
        start_new_session=True,
    )
    os.close(theirs)
    os.close(writing)
    messages = os.fdopen(reading)

    def type_when_asked(text: str) -> None:
        shown = ""
        while not shown.endswith(terminal.PROMPT):
            shown += os.read(ours, 1).decode()
        os.write(ours, text.encode())

    def type_text(text: str) -> str:
        type_when_asked(text)
        return ast.literal_eval(messages.readline())

    try:
        yield type_text
        type_when_asked("\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        messages.close()
        os.close(ours)


def has_gnu_readline() -> bool:
    readline = pytest.importorskip("readline")
    return "libedit" not in readline.__doc__


@pytest.mark.skipif(not has_gnu_readline(), reason="libedit does not know bracketed paste")
def test_read_message_edits_lines_keeps_a_history_and_takes_a_paste_as_one() -> None:
    with at_terminal() as type_text:
        assert type_text("ac\x1b[Db\r") == "abc"  # arrow left
        assert type_text("\x1b[A\r") == "abc"  # arrow up
        assert type_text("\x1b[200~one\ntwo\n\nthree\x1b[201~\r") == "one\ntwo\n\nthree"
        assert type_text("next\r") == "next"


@pytest.mark.parametrize("options", [[], ["plain"]])
def test_read_message_lines_that_come_at_once_are_one_message(options) -> None:
    with at_terminal(*options) as type_text:
        assert type_text("one\ntwo\nthree\n") == "one\ntwo\nthree"
        assert type_text("next\n") == "next"


def test_read_message_of_a_pipe_is_a_line(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n two\n"))
    assert [terminal.read_message() for _ in range(3)] == ["one", " two", None]


def test_remark_is_dim_at_a_terminal_only(monkeypatch, capsys) -> None:
    terminal.remark("a")
    assert capsys.readouterr().err == "a\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.remark("a")
    assert capsys.readouterr().err == "\x1b[2ma\x1b[0m\n"
