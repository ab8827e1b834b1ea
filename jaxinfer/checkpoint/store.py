"""Where tensors come from: safetensors files or arrays in memory, behind one small protocol.

Owns: opening files, reading slices as numpy, counting the bytes read.
Does not know: what a tensor means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@runtime_checkable
class TensorStore(Protocol):
    """Named tensors that can be read slice by slice."""

    def names(self) -> Iterable[str]:
        """All tensor names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor in its own dtype."""
        ...

    def where(self, name: str) -> str:
        """Where a tensor comes from, for messages."""
        ...


class SafetensorsStore:
    """The tensors of one or several safetensors files; only the slices asked for are read.

    Args:
      paths: the files.

    Raises:
      ValueError: a file is truncated or not safetensors, two files hold the same name, or a dtype is no float.
    """

    def __init__(self, paths: Iterable[Path]):
        self.bytes_read = 0
        self._slices: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
                if name in self._paths:
                    raise ValueError(f"tensor {name} is in both {self._paths[name]} and {path}")
                self._slices[name] = handle.get_slice(name)
                self._paths[name] = path

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._slices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor in its own dtype.

        Raises:
          ValueError: the tensor is not float64, float32, float16 or bfloat16.
        """
        dtype = self._slices[name].get_dtype()
        if dtype not in _FLOATS:
            raise ValueError(f"tensor {name} in {self._paths[name]} is {dtype}; supported: {', '.join(_FLOATS)}")
        values = self._slices[name][index]
        self.bytes_read += values.nbytes
        return values

    def where(self, name: str) -> str:
        """The file a tensor is in."""
        return str(self._paths[name])


class MemoryStore:
    """Tensors that are already arrays, by their checkpoint names.

    Args:
      tensors: name -> array (numpy or anything numpy can read).
    """

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(np.shape(self._tensors[name]))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor in its own dtype."""
        return np.asarray(self._tensors[name][index])

    def where(self, name: str) -> str:
        """Where it is, for messages."""
        return "params"
