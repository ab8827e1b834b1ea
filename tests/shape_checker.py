"""Checks that arrays have the shapes that functions and dataclasses are signed with."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

# For the import hook, too: an int is a float.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def assert_shapes(value) -> None:
    """The fields of a dataclass, and of the dataclasses in it, are what it is signed with.

    A jaxtyping.TypeCheckError says which is not.
    """
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    _checked_init(type(value))(object.__new__(type(value)), **values)
    for inner in values.values():
        if is_dataclass(inner):
            assert_shapes(inner)


@cache
def _checked_init(dataclass: type) -> Callable[..., None]:
    return jaxtyped(dataclass.__init__, typechecker=check)
