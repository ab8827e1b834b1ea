"""Holds engines, for tests of requests that must still run when something happens to them."""

import contextlib
import time
from collections.abc import Generator

from jaxinfer import LLM


@contextlib.contextmanager
def few_steps(llm: LLM, number: int = 6) -> Generator[None]:
    """Each engine of an LLM takes at most so many steps while this lasts, and still hears of cancelling and closing."""
    engines = [loaded.engine for loaded in llm._replicas]
    for engine in engines:
        engine.step = _limited(engine.step, number)
    try:
        yield
    finally:
        for engine in engines:
            del engine.step


def _limited(step, number):
    left = iter(range(number))

    def limited():
        if next(left, None) is not None:
            return step()
        time.sleep(0.001)
        return []

    return limited
