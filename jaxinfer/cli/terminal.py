"""Messages from a person at a terminal, or from a pipe, and short remarks to them.

Owns: line editing, pasted lines, remarks on standard error.
Does not know: jaxinfer; what messages mean.
"""

from __future__ import annotations

import contextlib
import select
import sys

PROMPT = "> "
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def enable_line_editing() -> None:
    """Gives a terminal's input() arrow keys and a history, if this Python has readline.

    Imported here, for readline sets up the terminal when it is imported: a pipe would receive control characters.
    """
    with contextlib.suppress(ImportError):  # Windows, whose terminal edits lines itself
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def read_message() -> str | None:
    """The next message; None at the end of input.

    A message is a line; at a terminal, what was pasted with it belongs to it, however many lines these are.

    Raises:
      KeyboardInterrupt: Ctrl-C.
    """
    is_terminal = sys.stdin.isatty()
    try:
        lines = [input(PROMPT if is_terminal else "")]
        # A pasted text comes as a whole where the terminal and readline mark pastes; elsewhere the lines are there at
        # once, as nobody types them.
        while is_terminal and _has_more():
            lines.append(input())
    except EOFError:
        return None
    return "\n".join(lines)


def _has_more() -> bool:
    """Whether input waits at the terminal."""
    return sys.platform != "win32" and bool(select.select([sys.stdin], [], [], 0)[0])


def remark(text: str) -> None:
    """Writes a line on standard error, where it is no part of a reply; dim at a terminal."""
    print(f"{_DIM}{text}{_PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
