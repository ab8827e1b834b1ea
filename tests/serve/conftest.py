"""A server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from jaxinfer import LLM

if TYPE_CHECKING:
    from jaxinfer.serve.http.server import BackgroundServer


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[LLM, BackgroundServer]]:
    from served_demo import served_demo  # needs the extra [serve]

    with served_demo() as pair:
        yield pair
