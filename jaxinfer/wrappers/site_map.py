"""Where on the mesh the sites of a model are.

Owns: which stage has a site, and which number its layer has there.
Does not know: jax, what happens at sites.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.sites import EMBEDDING, LAYER_SITES, split_layer


class SiteMap:
    """The sites of a model whose layers are divided among stages.

    Args:
      num_layers: of the model.
      num_stages: pipeline stages.
    """

    def __init__(self, num_layers: int, num_stages: int):
        self._num_layers = num_layers
        self._num_stages = num_stages
        self._layers_per_stage = -(-num_layers // num_stages)

    def local(self, name: str) -> tuple[int, str]:
        """The stage of a site, and its name with the number that its layer has within the stage.

        The embedding is the first stage's, everything else outside the layers the last stage's.
        """
        layer, rest = split_layer(name)
        if layer is None:
            return (0 if name == EMBEDDING else self._num_stages - 1), name
        stage, index = divmod(layer, self._layers_per_stage)
        return stage, f"layers.{index}.{rest}"

    def names(self, local_names: Iterable[str]) -> list[tuple[str, str]]:
        """All sites of the model, in the order in which a token passes them, each with its name within its stage."""
        found = []
        for local in local_names:
            index, rest = split_layer(local)
            if index is None:
                found.append((local, local))
            else:
                layers = range(index, self._num_layers, self._layers_per_stage)
                found += [(f"layers.{layer}.{rest}", local) for layer in layers]
        return sorted(found, key=lambda pair: self._place(pair[0]))

    def _place(self, name: str) -> tuple[int, int]:
        layer, rest = split_layer(name)
        if layer is None:
            return (-1 if name == EMBEDDING else self._num_layers), 0
        return layer, LAYER_SITES.index(rest) if rest in LAYER_SITES else len(LAYER_SITES)
