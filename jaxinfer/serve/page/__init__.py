"""The playground: one page of HTML, without a build step and without anything from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def page() -> bytes:
    """The page."""
    return files(__name__).joinpath("index.html").read_bytes()


@cache
def locked_page() -> bytes:
    """What a browser gets that has no key yet: it asks for one, and fetches the page with it."""
    return files(__name__).joinpath("locked.html").read_bytes()
