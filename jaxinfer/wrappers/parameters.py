"""The parameters of a model as a tree for users: nested dicts by the parts of their names.

Owns: the form of the tree, and the checks of arrays that are to take the place of parameters.
Does not know: what the parameters are for, files.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxinfer.layers.weight import SCALE, quantizer, swapped_axes, swapped_sharding


def as_tree(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of arrays by dotted name: {"norm.weight": x} becomes {"norm": {"weight": x}}.

    Example:
      >>> as_tree({"norm.weight": 1, "layers.0.mlp.down.weight": 2})
      {'norm': {'weight': 1}, 'layers': {'0': {'mlp': {'down': {'weight': 2}}}}}
    """
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parts, last = name.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = array
    return tree


def by_name(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The arrays of a tree by dotted name; the inverse of as_tree.

    Raises:
      TypeError: the tree is not made of mappings with strings as keys.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"weights must be nested dicts like llm.params, got {type(tree).__name__}")
    arrays: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of weights must be strings like those of llm.params, got {key!r}")
        arrays |= by_name(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return arrays


def swapped(array: Any) -> Any:
    """A matrix [.., O, I] on a mesh as [.., I, O] and vice versa, in a new array; or its shape, dtype and sharding."""
    sharding = swapped_sharding(array.sharding, array.ndim)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(swapped_axes(array.shape), array.dtype, sharding=sharding)
    return _swapper(sharding)(array)


@functools.cache
def _swapper(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array.swapaxes(-1, -2), out_shardings=sharding)


def replacements(
    tree: Mapping[str, Any], present: Mapping[str, jax.ShapeDtypeStruct], *, only: Callable[[str], bool] | None = None
) -> dict[str, jax.Array]:
    """Checked copies of new parameters, on the devices and in the sharding of the present ones.

    Args:
      tree: like as_tree(present); with `only` it may lack what that leaves out. A float array in the place of an int8
        matrix is rounded to int8, and its scales with it.
      present: shape, dtype and sharding of the model's parameters by dotted name.
      only: which names are replaced; None for all.

    Raises:
      TypeError: the tree is not made of dicts.
      ValueError: a parameter is missing or unknown, or an array has another shape, dtype or sharding, or NaN or
        infinity in it, or integers come without their scales; the message names it.
    """
    given = by_name(tree)
    for name in given:
        if name not in present:
            near = difflib.get_close_matches(name, list(present), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the model has no parameter {name!r}{hint}")
    rounded = [name for name, new in given.items() if name + SCALE in present and _is_float(new)]
    for name in rounded:
        if name + SCALE in given:
            raise ValueError(f"{name}{SCALE} follows from the floats that are given for {name}; leave it out")
    scales = {name + SCALE for name in rounded}
    wanted = [name for name in present if name not in scales and (only is None or only(name))]
    if not wanted:
        raise ValueError(
            f"only=.. chooses none of the model's {len(present)} parameters, such as {next(iter(present))}"
        )
    missing = [name for name in wanted if name not in given]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"the weights lack {missing[0]}{others}; choose with only=.. what is to be replaced")
    for name in wanted:
        if name + SCALE in present and name not in rounded and name + SCALE not in wanted:
            raise ValueError(
                f"only=.. chooses {name} without {name}{SCALE}, and integers mean nothing without their scales; choose "
                "both, or give the matrix in floats"
            )
    new: dict[str, jax.Array] = {}
    for name in wanted:
        if name in rounded:
            floats = _checked(name, given[name], present[name], dtype=given[name].dtype)
            new[name], new[name + SCALE] = quantizer(present[name].sharding, floats.ndim)(floats)
        else:
            new[name] = _checked(name, given[name], present[name], dtype=present[name].dtype)
    return new


def _is_float(array: Any) -> bool:
    return isinstance(array, (jax.Array, np.ndarray)) and jnp.issubdtype(array.dtype, jnp.floating)


def _checked(name: str, new: Any, present: jax.ShapeDtypeStruct, *, dtype: jnp.dtype) -> jax.Array:
    """A copy of an array that can take the place of a parameter; the caller may go on to donate or change theirs."""
    if not isinstance(new, (jax.Array, np.ndarray)):
        raise ValueError(f"{name} must be an array, got {type(new).__name__}")
    if new.shape != present.shape or new.dtype != dtype:
        raise ValueError(f"{name} must be {dtype.name}{list(present.shape)}, got {new.dtype.name}{list(new.shape)}")
    if isinstance(new, np.ndarray):
        placed = jax.device_put(np.array(new), present.sharding)  # JAX may take over the memory of an array on a CPU
    elif new.sharding.is_equivalent_to(present.sharding, new.ndim):
        placed = jnp.copy(new)
    else:
        raise ValueError(
            f"{name} is sharded as {new.sharding}, expected {present.sharding}; use jax.device_put(x, "
            "like.sharding) with the array of llm.params"
        )
    if not bool(jnp.isfinite(placed).all()):
        raise ValueError(f"{name} has NaN or infinity in it")
    return placed
