"""The errors that end a request after it was accepted.

Owns: EngineClosedError and RequestFailedError, and which exceptions are never a request's own.
Does not know: anything else. What is wrong with a call's arguments is a ValueError or TypeError where it is found.
"""

from __future__ import annotations

INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Exceptions that come from outside. All others may be a request's own, including those that are no Exception: a panic
of a library written in Rust derives from BaseException."""


class EngineClosedError(RuntimeError):
    """The engine was closed, or died of the exception in __cause__, while or before a request ran."""


class RequestFailedError(RuntimeError):
    """One request was ended by an exception of its own, which is the __cause__; the other requests go on.

    Such an exception comes from what belongs to the request: its tokenizer, its constraint or whoever reads its output.
    """

    @classmethod
    def caused_by(cls, cause: BaseException) -> RequestFailedError:
        """The error that tells a caller of a cause."""
        error = cls(f"the request failed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error
