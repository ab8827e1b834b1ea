"""Reads messages from a terminal or a pipe, and prints short remarks on standard error.

Owns: line editing, joining pasted lines into one message, remarks.
Does not know: the rest of jaxinfer; what messages mean.
"""

from __future__ import annotations

import contextlib
import select
import sys

PROMPT = "> "
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def enable_line_editing() -> None:
    """Gives input() arrow keys and a history, if this Python has readline. Call it only at a terminal.

    readline is imported here and not at the top because it writes control characters to the terminal when it is
    imported, which a pipe would receive too.
    """
    with contextlib.suppress(ImportError):  # Windows has no readline; its terminal edits lines itself
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def read_message() -> str | None:
    """Reads the next message; returns None at the end of the input.

    A message is one line. At a terminal, lines that were pasted together are one message.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed.
    """
    is_terminal = sys.stdin.isatty()
    try:
        lines = [input(PROMPT if is_terminal else "")]
        # If terminal and readline support bracketed paste, input() returns all pasted lines. Otherwise further lines
        # are taken for pasted because they are there at once, faster than anybody types.
        while is_terminal and _has_more():
            lines.append(input())
    except EOFError:
        return None
    return "\n".join(lines)


def _has_more() -> bool:
    """Whether the terminal has input that was not read yet."""
    return sys.platform != "win32" and bool(select.select([sys.stdin], [], [], 0)[0])


def remark(text: str) -> None:
    """Prints a line on standard error, so that it is not part of a reply; in dim text at a terminal."""
    print(f"{_DIM}{text}{_PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
