"""Errors about unknown keywords, which name the nearest known one.

Owns: how such an error reads, and the decorator that makes a dataclass raise it.
Does not know: which keywords there are.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

_Settings = TypeVar("_Settings")


def unknown_keyword(keyword: object, known: Iterable[str]) -> TypeError:
    """The error for an unknown keyword (a file's may be no string); its message names the nearest known one."""
    near = difflib.get_close_matches(str(keyword), list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return TypeError(f"unknown argument {keyword!r}{hint}")


def names_nearest_field(settings: type[_Settings]) -> type[_Settings]:
    """Makes the error about an unknown keyword of a dataclass name the nearest field; a decorator above @dataclass.

    It applies wherever an instance is made (a call, dataclasses.replace). Signature, copies and pickles stay those of
    the dataclass.

    Example:
      >>> from dataclasses import dataclass
      >>> @names_nearest_field
      ... @dataclass
      ... class Size:
      ...     width: int
      >>> Size(width=3)
      Size(width=3)
      >>> Size(widht=3)
      Traceback (most recent call last):
      TypeError: unknown argument 'widht'; did you mean 'width'?
    """
    initialise: Callable[..., None] = settings.__init__
    known = [field.name for field in dataclasses.fields(cast(Any, settings))]

    @functools.wraps(initialise)
    def initialise_known(self: object, *values: Any, **keywords: Any) -> None:
        for keyword in keywords:
            if keyword not in known:
                raise unknown_keyword(keyword, known)
        initialise(self, *values, **keywords)

    cast(Any, settings).__init__ = initialise_known
    return settings
