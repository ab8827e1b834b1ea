"""Functions of the user's that become part of a step's program, with parameters of their own for each request.

Owns: which parameters a function has, the checks of those that are given, constants.
Does not know: jax, what the function changes (interventions.py, logits_functions.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from jaxinfer.config.keywords import unknown_keyword


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RequestFunction:
    """A pure function (x, context, *, parameters) -> x, traceable by JAX.

    Args:
      function: the function; parameters are its keyword-only arguments.
      per_token: names of the parameters that have an entry for each token of the window, of which the function gets the
        one of its token.
      constants: arrays that are the same for all requests, passed like parameters.
    """

    function: Callable[..., Any]
    per_token: tuple[str, ...] = ()
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))

    def with_constants(self, **arrays: Any) -> Self:
        """The same with some parameters set for all requests, such as the weights of a sparse autoencoder.

        Do it once and keep the result: programs are compiled anew for every result.

        Raises:
          TypeError, ValueError: as parameter_arrays.
        """
        return replace(self, constants={**self.constants, **self._arrays(arrays)})

    def parameter_arrays(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The parameters of a request, as numpy arrays of 32 bits.

        Raises:
          TypeError: an unknown or missing parameter, one that is a constant, or one that is not made of numbers.
          ValueError: a parameter is NaN or infinite, or an integer beyond 32 bits.
        """
        arrays = self._arrays(given)
        known = function_parameters(self.function)
        missing = [name for name, needed in known.items() if needed and name not in {*given, *self.constants}]
        if missing:
            raise TypeError(f"{self} needs {', '.join(missing)}")
        return arrays

    def _arrays(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        known = function_parameters(self.function)
        for name in given:
            if name not in known:
                raise unknown_keyword(name, known)
            if name in self.constants:
                raise TypeError(f"{name} of {self} is a constant already")
        return {name: _as_array(f"{name} of {self}", value) for name, value in given.items()}


def function_parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """The parameters of a function (x, context, *, parameters) by name, and whether they have no default.

    Raises:
      TypeError: the function takes other arguments.
    """
    entries = list(inspect.signature(function).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if [entry.kind in positional for entry in entries[:2]] != [True, True] or any(
        entry.kind is not inspect.Parameter.KEYWORD_ONLY for entry in entries[2:]
    ):
        raise TypeError(
            f"expected a function (x, context, *, parameters), got {function!r} with {inspect.signature(function)}; "
            "put a * in front of the parameters"
        )
    return {entry.name: entry.default is inspect.Parameter.empty for entry in entries[2:]}


def _as_array(what: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind == "V" and hasattr(value, "astype"):  # bfloat16
        array = np.asarray(value.astype(np.float32))
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{what} must be numbers, got dtype {array.dtype}")
    if array.dtype.kind in "iu" and array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise ValueError(f"{what} must be in -2**31..2**31 - 1, got {array.min()}..{array.max()}")
    wanted = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.bool_}[array.dtype.kind]
    with np.errstate(over="ignore"):
        narrowed = array.astype(wanted)
    if array.dtype.kind == "f" and not np.isfinite(narrowed).all():
        raise ValueError(f"{what} must be finite in float32, got NaN, infinity or a larger number")
    return narrowed
