"""The errors that end a request after it was accepted; wrong arguments raise ValueError or TypeError before that.

Owns: EngineClosedError, ProcessLostError and RequestFailedError; the exceptions that are never blamed on a request.
Does not know: any other module.
"""

from __future__ import annotations

INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Exceptions that interrupt the whole process or a generator, so they must not be taken for the failure of a request.

Any other BaseException may be caused by a request, not only an Exception: a panic in a library written in Rust (such as
tokenizers) derives from BaseException directly.
"""


class EngineClosedError(RuntimeError):
    """The engine was closed, or stopped on the exception in __cause__, before the request had ended."""


class ProcessLostError(EngineClosedError):
    """A process of a run with several was lost, failed or got stuck; the message names it, and this one ends, too."""


class RequestFailedError(RuntimeError):
    """One request failed, because of the exception in __cause__; the other requests go on.

    Such an exception is raised by something that serves this request alone: the decoding of its tokens, its constraint,
    or the callback (on_update) that notifies its reader.
    """

    @classmethod
    def caused_by(cls, cause: BaseException) -> RequestFailedError:
        """Makes the error for a cause, which becomes its __cause__ and part of its message."""
        error = cls(f"the request failed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error
