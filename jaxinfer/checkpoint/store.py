"""Where tensors come from: safetensors files or arrays in memory, behind one small protocol.

Owns: opening files, copying slices into numpy buffers, counting the bytes read.
Does not know: which parameter a tensor belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open

_FLOATS = ("F64", "F32", "F16", "BF16")
_BLOCK_BYTES = 2**20


@runtime_checkable
class TensorStore(Protocol):
    """Named tensors that can be copied slice by slice."""

    def names(self) -> Iterable[str]:
        """All tensor names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        ...

    def read(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copies a slice of one tensor into `out`, cast to its dtype."""
        ...

    def where(self, name: str) -> str:
        """Where a tensor comes from (such as its file), for messages."""
        ...


class SafetensorsStore:
    """The tensors of one or several safetensors files; only the slices asked for are read.

    Args:
      paths: the files.

    Raises:
      ValueError: a file is truncated or not safetensors, or two files hold the same name.
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

    def read(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copies a slice of one tensor into `out`, cast to its dtype.

        Args:
          name: of the tensor.
          index: start and stop along every axis.
          out: any float dtype, shaped as the slice.

        Raises:
          ValueError: the tensor is not of a floating-point dtype, or holds values that out's dtype cannot.
        """
        dtype = self._slices[name].get_dtype()
        if dtype not in _FLOATS:
            raise ValueError(f"tensor {name} in {self._paths[name]} is {dtype}; supported: {', '.join(_FLOATS)}")
        # safetensors returns every slice in a new buffer. For small blocks that is the same memory again, which stays
        # in the CPU's cache; a whole tensor would take fresh memory, whose page faults cost more than the copy.
        rows, *others = index
        step = max(1, _BLOCK_BYTES // max(1, out[:1].nbytes))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            values = self._slices[name][(slice(start, stop), *others)]
            self.bytes_read += values.nbytes
            _copy(values, out[start - rows.start : stop - rows.start], f"{name} in {self._paths[name]}")

    def where(self, name: str) -> str:
        """The file a tensor is in."""
        return str(self._paths[name])


class MemoryStore:
    """Tensors that are already arrays, by their checkpoint names.

    Args:
      tensors: name -> array of a floating-point dtype, or nested lists of floats.
    """

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = {
            name: tensor if hasattr(tensor, "dtype") else np.asarray(tensor) for name, tensor in tensors.items()
        }

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(np.shape(self._tensors[name]))

    def read(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copies a slice of one tensor into `out`, cast to its dtype.

        Raises:
          ValueError: the tensor is not float64, float32, float16 or bfloat16, or holds values that out's dtype cannot.
        """
        values = np.asarray(self._tensors[name][index])
        if "float" not in values.dtype.name:  # bfloat16 and float8 are no floats to numpy
            raise ValueError(f"tensor {name} in {self.where(name)} is {values.dtype}, expected floating-point numbers")
        _copy(values, out, f"{name} in {self.where(name)}")

    def fingerprint(self) -> str:
        """The tensors' identity in 32 hexadecimal digits: their names and shapes, and the last row of each."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(f"{name}:{self.shape(name)}:".encode())
            rows = np.atleast_1d(np.asarray(self._tensors[name]))
            digest.update(rows[-1:].astype(np.float32).tobytes())
        return digest.hexdigest()[:32]

    def where(self, name: str) -> str:
        """Always "params", the argument that such tensors come from; for messages."""
        return "params"


def _copy(values: np.ndarray, out: np.ndarray, tensor: str) -> None:
    try:
        with np.errstate(over="raise"):
            out[...] = values
    except FloatingPointError as error:
        raise ValueError(f"tensor {tensor} holds values beyond {out.dtype}; choose another dtype") from error
