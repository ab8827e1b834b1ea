"""A module whose parameters are passed to compiled programs as a flat list.

Owns: the order of the list, and the names of its entries.
Does not know: what the module computes.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx


class FlatModule:
    """The abstract parameters of a module as a flat list in a fixed order; merge rebuilds the module from arrays."""

    def __init__(self, module: nnx.Module):
        self._graph, state = nnx.split(module)
        self._tree = jax.tree.structure(state)
        found = nnx.to_flat_state(state)
        self.paths = [path for path, _ in found]
        self.variables = [variable for _, variable in found]
        self.leaves = [variable.get_value() for variable in self.variables]
        self.specs = [variable.spec for variable in self.variables]

    def merge(self, leaves: list[Any]) -> Any:
        """The module with these arrays as its parameters."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))


def dotted(path: tuple[Any, ...]) -> str:
    """A path in a module as a name, such as "layers.0.mlp.down.weight"."""
    return ".".join(map(str, path))
