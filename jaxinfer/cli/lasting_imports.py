"""Imports that last as long as the process, which Python's garbage collector therefore need not look through.

Owns: when the collector rests, and what it leaves out afterwards.
Does not know: what is imported.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Imports JAX, and what needs it, without the collector, which never looks at their objects later on either.

    Otherwise it goes through these hundreds of thousands of objects again and again: for 0.2 s while they are made and
    for 0.4 s when Python ends. If JAX is imported already, the process is not the command's alone, and nothing changes.
    """
    if "jax" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
