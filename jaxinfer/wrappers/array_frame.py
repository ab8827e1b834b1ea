"""Dataclasses of numpy arrays as bytes of a fixed layout, which follows from their annotations.

Owns: which arrays a dataclass has, writing and reading them.
Does not know: what the arrays mean.

A group of arrays is written as the sizes of its dimensions, in the order in which the annotations name them first, and
the arrays in the order of the fields, each filled up to a multiple of 4 bytes.
"""

from __future__ import annotations

import functools
import itertools
import math
import typing
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

WORD = 4
"""Bytes of a number, to a multiple of which arrays are filled up."""


class FrameError(ValueError):
    """The bytes are no such frame."""


@dataclass(frozen=True, slots=True)
class ArrayField:
    """An array of a dataclass.

    Args:
      name: of the field.
      dtype: of its elements.
      dims: names of its dimensions, or numbers where they are fixed.
    """

    name: str
    dtype: np.dtype
    dims: tuple[str, ...]


@functools.cache
def array_fields(kind: type) -> tuple[ArrayField, ...]:
    """The arrays of a dataclass, as its annotations describe them; those that may be None are among them."""
    found = []
    hints = typing.get_type_hints(kind)
    for entry in fields(kind):
        for hint in typing.get_args(hints[entry.name]) or (hints[entry.name],):
            if hasattr(hint, "dim_str"):
                found.append(ArrayField(entry.name, np.dtype(hint.dtypes[0]), tuple(hint.dim_str.split())))
    return tuple(found)


@functools.cache
def dims(kind: type) -> tuple[str, ...]:
    """The named dimensions of a dataclass, in the order of their first use."""
    names = itertools.chain.from_iterable(field.dims for field in array_fields(kind))
    return tuple(dict.fromkeys(name for name in names if not name.isdecimal()))


def pack_arrays(group: Any) -> tuple[list[int], bytes]:
    """The sizes of a dataclass's dimensions, and its arrays; those that are None are left out."""
    sizes: dict[str, int] = {}
    parts: list[bytes] = []
    for field in array_fields(type(group)):
        array = getattr(group, field.name)
        if array is not None:
            sizes.update(zip(field.dims, array.shape, strict=True))
            data = array.tobytes()
            parts += (data, bytes(-len(data) % WORD))
    return [sizes[name] for name in dims(type(group))], b"".join(parts)


def read_arrays(
    kind: type, frame: bytes, offset: int, sizes: Mapping[str, int], *, missing: Container[str] = ()
) -> tuple[dict[str, np.ndarray], int]:
    """Reads the arrays of a dataclass.

    Args:
      kind: the dataclass.
      frame: the bytes.
      offset: at which the first array begins.
      sizes: of the dimensions, by name.
      missing: names of fields that were left out.

    Returns:
      The arrays by field, which are views of the frame and read-only, and the offset behind them.

    Raises:
      FrameError: they do not fit into the frame, or a bool is neither 0 nor 1.
    """
    arrays = {}
    for field in array_fields(kind):
        if field.name not in missing:
            arrays[field.name], offset = _read(frame, offset, field, sizes)
    return arrays, offset


def _read(frame: bytes, offset: int, field: ArrayField, sizes: Mapping[str, int]) -> tuple[np.ndarray, int]:
    """An array that begins at an offset, and the offset behind it."""
    shape = [int(name) if name.isdecimal() else sizes[name] for name in field.dims]
    count = math.prod(shape)
    end = offset + count * field.dtype.itemsize
    if min(shape) < 0 or end > len(frame):
        raise FrameError(f"{field.name} of shape {shape} does not fit into a frame of {len(frame)} bytes")
    if field.dtype == bool and count and np.frombuffer(frame, np.uint8, count, offset).max() > 1:
        raise FrameError(f"{field.name} must have bytes of 0 or 1")
    array = np.frombuffer(frame, field.dtype, count, offset).reshape(shape)
    return array, end + -end % WORD
