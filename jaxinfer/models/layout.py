"""How a model is laid out on the mesh: which layers a stage holds, which heads a shard holds.

Owns: the arithmetic of the layout and the errors of impossible ones.
Does not know: any family, devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.layers.kv_cache import CacheShape

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a model is built for.

    Args:
      num_stages, num_shards: pipeline stages and tensor shards of the mesh.
      dtype: of parameters and activations.
      max_model_len: tokens the engine will serve.
      attention_backend: of paged_attention, already chosen.
    """

    num_stages: int
    num_shards: int
    dtype: jnp.dtype
    max_model_len: int
    attention_backend: str

    def check(self, config: ModelConfig) -> None:
        """Refuses a model that this mesh cannot hold; the vocabulary, which is padded, always fits.

        Raises:
          ValueError: the message names the numbers and the setting.
        """
        if self.num_stages > config.num_layers:
            raise ValueError(
                f"pipeline_parallel_size must be <= {config.num_layers}, the model's layers, got {self.num_stages}"
            )
        divided = [(config.num_heads, "query heads")]
        if config.num_experts:
            divided.append((config.num_experts, "experts"))
        if len(config.expert_layers) < config.num_layers:
            divided.append((config.ffn_size, "feed-forward features"))
        for count, what in divided:
            if count % self.num_shards:
                raise ValueError(f"tensor_parallel_size must divide the model's {count} {what}, got {self.num_shards}")
        few, many = sorted((config.num_kv_heads, self.num_shards))
        if many % few:
            raise ValueError(
                f"tensor_parallel_size must divide the model's {config.num_kv_heads} kv heads or be a multiple of "
                f"them, got {self.num_shards}"
            )

        for index in range(self.layers_per_stage(config)):
            self.has_experts(config, index)

    def has_experts(self, config: ModelConfig, local_layer: int) -> bool:
        """Whether a local layer is a mixture of experts.

        Raises:
          ValueError: it is on some stages only.
        """
        layers = range(local_layer, config.num_layers, self.layers_per_stage(config))
        mixed = [layer for layer in layers if layer in config.expert_layers]
        if mixed and len(mixed) < len(layers):
            dense = [layer for layer in layers if layer not in mixed]
            raise ValueError(
                f"with pipeline_parallel_size {self.num_stages}, layers {mixed} with experts and layers {dense} "
                f"without stand at one place of different stages; choose a size whose stages are alike"
            )
        return bool(mixed)

    def cache_shape(self, config: ModelConfig, *, num_pages: int, page_size: int) -> CacheShape:
        """The KV pool of num_pages pages a stage, the dump page included."""
        return CacheShape(
            num_layers=self.layers_per_stage(config),
            num_stages=self.num_stages,
            num_pages=num_pages,
            num_kv_heads=self.num_kv_heads(config),
            page_size=page_size,
            head_dim=config.head_dim,
        )

    def layers_per_stage(self, config: ModelConfig) -> int:
        """Local layers every stage holds; the last stages' surplus is padding."""
        return -(-config.num_layers // self.num_stages)

    def num_kv_heads(self, config: ModelConfig) -> int:
        """KV heads over all shards; every head is there several times when shards outnumber heads."""
        return max(config.num_kv_heads, self.num_shards)

    def kv_copies(self, config: ModelConfig) -> int:
        """How many shards hold the same kv head."""
        return self.num_kv_heads(config) // config.num_kv_heads

    def by_stage(self, config: ModelConfig, per_layer: Sequence[T], local_layer: int) -> tuple[T, ...]:
        """A local layer's value on every stage.

        Args:
          config: the model's numbers.
          per_layer: one value a layer of the model.
          local_layer: index in every stage; where it is padding, the first stage's value stands in, so that stages
            differ only where the model does.
        """
        found = list(per_layer[local_layer :: self.layers_per_stage(config)])
        return tuple(found + found[:1] * (self.num_stages - len(found)))

    def windows(self, config: ModelConfig, local_layer: int) -> tuple[int | None, ...]:
        """Tokens that queries of a local layer see on every stage; None for all."""
        return self.by_stage(config, config.windows or (None,) * config.num_layers, local_layer)
