"""LoopWaker: calls functions in an event loop on behalf of other threads, many at a time.

Owns: waking the loop once for all functions that come before it looks.
Does not know: what the functions do.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from typing import ClassVar


class LoopWaker:
    """Calls functions in one loop on behalf of other threads.

    A step of the engine brings a token to each of its requests. Waking the loop for each of them would cost a system
    call a token; the loop is woken once, and tells all of their readers.

    Args:
      loop: where the functions are called.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)
        self._due: deque[Callable[[], object]] = deque()
        self._is_woken = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> LoopWaker:
        """The one waker of a loop; called in the loop."""
        waker = cls._of.get(loop)
        if waker is None:
            waker = cls._of[loop] = cls(loop)
        return waker

    def call_soon(self, function: Callable[[], object]) -> None:
        """Has the loop call a function, which must not raise; any thread may ask for it.

        Raises:
          RuntimeError: the loop is closed.
        """
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._due.append(function)
        if not self._is_woken:
            self._is_woken = True
            loop.call_soon_threadsafe(self._call_all)

    def _call_all(self) -> None:
        self._is_woken = False  # before looking, so that what is added from now on wakes the loop again
        while self._due:
            self._due.popleft()()
