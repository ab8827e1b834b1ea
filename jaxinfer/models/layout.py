"""How a model is laid out on the mesh: which layers a stage holds, which heads a shard holds.

Owns: the arithmetic of the layout, and the errors for a model that does not fit the mesh.
Does not know: model families, devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp

from jaxinfer.config.attention_span import WHOLE_TEXT, AttentionSpan
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.layers.kv_cache import CacheShape

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The mesh and the settings that a model is built for.

    Args:
      num_stages, num_shards: pipeline stages and tensor shards of the mesh.
      dtype: of parameters and activations.
      max_model_len: tokens of the longest text that the engine will serve.
      attention_backend: name of the kernel backend, already resolved (not "auto").
      span: what the settings let a token see; layers may see less.
      quantization: how matrices of weights are kept, "int8" or None for dtype.
      inputs_first: whether the matrices of linear layers are kept as [in, out].
    """

    num_stages: int
    num_shards: int
    dtype: jnp.dtype
    max_model_len: int
    attention_backend: str
    span: AttentionSpan = WHOLE_TEXT
    quantization: str | None = None
    inputs_first: bool = False

    @property
    def matrix_dtype(self) -> jnp.dtype:
        """The dtype of the matrices of products."""
        return self.dtype if self.quantization is None else jnp.dtype(self.quantization)

    @property
    def weight_dtypes(self) -> str:
        """The dtypes of the parameters, for people to read: "float32", or "int8 and float32" if matrices are int8."""
        return self.dtype.name if self.quantization is None else f"{self.quantization} and {self.dtype.name}"

    def check(self, config: ModelConfig) -> None:
        """Refuses a model whose layers, heads, experts or feed-forward do not divide among stages and shards.

        The vocabulary always fits, since it is padded.

        Raises:
          ValueError: the model does not fit; the message names the numbers and the setting to change.
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
          ValueError: it is one on some stages and a plain feed-forward on others.
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
        """The shape of a KV cache with num_pages pages per stage, the dump page included."""
        return CacheShape(
            num_layers=self.layers_per_stage(config),
            num_stages=self.num_stages,
            num_pages=num_pages,
            num_kv_heads=self.num_kv_heads(config),
            page_size=page_size,
            head_dim=config.head_dim,
        )

    def layers_per_stage(self, config: ModelConfig) -> int:
        """Layers that each stage holds, padding included.

        10 layers on 4 stages take 3 per stage: stages 0 to 2 hold three layers, stage 3 holds one and two of padding.
        """
        return -(-config.num_layers // self.num_stages)

    def num_kv_heads(self, config: ModelConfig) -> int:
        """KV heads of all shards together, copies included: one per shard where shards outnumber the kv heads."""
        return max(config.num_kv_heads, self.num_shards)

    def kv_copies(self, config: ModelConfig) -> int:
        """How many shards hold the same kv head; 1 unless shards outnumber the kv heads."""
        return self.num_kv_heads(config) // config.num_kv_heads

    def by_stage(self, config: ModelConfig, per_layer: Sequence[T], local_layer: int) -> tuple[T, ...]:
        """A local layer's value on every stage.

        Args:
          config: the model's numbers.
          per_layer: one value per layer of the model.
          local_layer: number of the layer within its stage. A stage on which it is padding gets the first stage's
            value, so that padding alone never makes stages differ.
        """
        found = list(per_layer[local_layer :: self.layers_per_stage(config)])
        return tuple(found + found[:1] * (self.num_stages - len(found)))

    def windows(self, config: ModelConfig, local_layer: int) -> tuple[int | None, ...]:
        """A local layer's own sliding window on every stage, in tokens; None where the model has none."""
        return self.by_stage(config, config.layer_windows, local_layer)

    def spans(self, config: ModelConfig, local_layer: int) -> tuple[AttentionSpan, ...]:
        """What a token sees in a local layer, on every stage."""
        return tuple(map(self.span.within, self.windows(config, local_layer)))
