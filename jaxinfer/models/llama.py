"""Llama: RMSNorm, grouped-query attention with rotary positions, SwiGLU.

Owns: the family's layer order, its config.json fields and its checkpoint names.
Does not know: files, batches' origin, sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import stage_value
from jaxinfer.config import ModelConfig
from jaxinfer.layers import rope
from jaxinfer.layers.attention import Attention, TokenBatch
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.layers.mlp import GatedMLP
from jaxinfer.layers.moe import MixtureOfExperts
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.rope import RotaryTables
from jaxinfer.models.hf_config import parse_decoder
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import ModelFamily

TENSOR_NAMES = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "layers.{layer}.attention_norm.weight": ("model.layers.{layer}.input_layernorm.weight",),
    "layers.{layer}.attention.qkv.weight": (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
    "layers.{layer}.attention.qkv.bias": (
        "model.layers.{layer}.self_attn.q_proj.bias",
        "model.layers.{layer}.self_attn.k_proj.bias",
        "model.layers.{layer}.self_attn.v_proj.bias",
    ),
    "layers.{layer}.attention.out.weight": ("model.layers.{layer}.self_attn.o_proj.weight",),
    "layers.{layer}.attention.out.bias": ("model.layers.{layer}.self_attn.o_proj.bias",),
    "layers.{layer}.mlp_norm.weight": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "layers.{layer}.mlp.gate_up.weight": (
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
    ),
    "layers.{layer}.mlp.gate_up.bias": (
        "model.layers.{layer}.mlp.gate_proj.bias",
        "model.layers.{layer}.mlp.up_proj.bias",
    ),
    "layers.{layer}.mlp.down.weight": ("model.layers.{layer}.mlp.down_proj.weight",),
    "layers.{layer}.mlp.down.bias": ("model.layers.{layer}.mlp.down_proj.bias",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Llama config.json.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.
    """
    attention_bias = bool(fields.get("attention_bias", False))
    return parse_decoder(
        fields,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


class LlamaLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); arguments as Llama's, and the local layer's number.

    With norms in both places, each block's output is normalised once more before it is added; with norms behind, only
    then. The feed-forward is one block or a mixture of experts.
    """

    def __init__(self, config: ModelConfig, layout: Layout, index: int):
        size, stages, dtype = config.hidden_size, layout.num_stages, layout.dtype

        def norm(place: str) -> RMSNorm | None:
            if config.norm_places not in (place, "both"):
                return None
            return RMSNorm(size, eps=config.norm_eps, num_stages=stages, dtype=dtype, offset=config.norm_offset)

        self.attention_norm, self.mlp_norm = norm("before"), norm("before")
        self.attention_post_norm, self.mlp_post_norm = norm("behind"), norm("behind")
        self.attention = Attention(
            config,
            num_stages=stages,
            num_shards=layout.num_shards,
            kv_copies=layout.kv_copies(config),
            windows=layout.windows(config, index),
            backend=layout.attention_backend,
            dtype=dtype,
        )
        if layout.has_experts(config, index):
            self.mlp = MixtureOfExperts(config, num_stages=stages, num_shards=layout.num_shards, dtype=dtype)
        else:
            self.mlp = GatedMLP(
                size,
                config.ffn_size,
                num_stages=stages,
                dtype=dtype,
                bias=config.mlp_bias,
                activation=config.activation,
                backend=layout.attention_backend,
            )

    def __call__(
        self,
        x: Float[Array, "T D"],
        cache: LayerCache,
        batch: TokenBatch,
        rotary: RotaryTables | None,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """One layer of one stage; returns the new residual stream and the written cache."""
        x, cache = self.attention(x, cache, batch, rotary, norm=self.attention_norm, post_norm=self.attention_post_norm)
        if isinstance(self.mlp, MixtureOfExperts):
            fed = self.mlp(_normalised(x, self.mlp_norm), batch.live)
            return x + _normalised(fed, self.mlp_post_norm), cache
        return self.mlp(x, norm=self.mlp_norm, post_norm=self.mlp_post_norm), cache


def _normalised(x: Float[Array, "T D"], norm: RMSNorm | None) -> Float[Array, "T D"]:
    return x if norm is None else norm(x)


class Llama(nnx.Module):
    """A Llama model, or one of its relatives, whose local layer j of every stage is stacked in layers[j].

    Args:
      config: the model's numbers.
      layout: mesh sizes, dtype, context length and attention backend.

    Source: Touvron et al. 2023; Hugging Face transformers' LlamaForCausalLM, against whose results it is tested.
    """

    def __init__(self, config: ModelConfig, layout: Layout):
        self.config = config
        self.max_model_len = layout.max_model_len
        num_devices = layout.num_stages * layout.num_shards

        def table() -> VocabularyEmbedding:
            return VocabularyEmbedding(
                config.vocab_size,
                config.hidden_size,
                num_shards=num_devices,
                dtype=layout.dtype,
                logit_softcap=config.logit_softcap,
            )

        self.embedding = table()
        self.layers = nnx.List([LlamaLayer(config, layout, index) for index in range(layout.layers_per_stage(config))])
        self.norm = RMSNorm(
            config.hidden_size, eps=config.norm_eps, num_stages=None, dtype=layout.dtype, offset=config.norm_offset
        )
        self.lm_head = None if config.tie_word_embeddings else table()

    def embed(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token ids to the residual stream; positions come in by rotation, layer by layer."""
        x = self.embedding.embed(token_ids)
        # The scale is rounded to x's dtype first, as the checkpoints were trained with it.
        return x if self.config.embedding_scale == 1 else x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def run_layers(
        self, x: Float[Array, "T D"], caches: Sequence[LayerCache], batch: TokenBatch
    ) -> tuple[Float[Array, "T D"], list[LayerCache]]:
        """This stage's layers; caches are one a local layer and come back written."""
        rotary, written = self._rotary(batch.positions), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache, batch, rotary(layer.attention.windows))
            written.append(cache)
        return x, written

    def _rotary(self, positions: Int[Array, " T"]) -> Callable[[Sequence[int | None]], RotaryTables]:
        """The rotary tables of a layer with these windows by stage."""
        rules = list(dict.fromkeys([self.config.rope_for(None), self.config.rope_for(1)]))  # without and with a window
        tables = [
            rope.rotary_tables(
                positions, *rope.rotary_frequencies(rule, self.config.head_dim, max_model_len=self.max_model_len)
            )
            for rule in rules
        ]

        def of(windows: Sequence[int | None]) -> RotaryTables:
            chosen = stage_value([rules.index(self.config.rope_for(window)) for window in windows])
            if isinstance(chosen, int):
                return tables[chosen]
            return jax.tree.map(lambda *options: jnp.stack(options)[chosen], *tables)

        return of

    def final_norm(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """The norm in front of the head."""
        return self.norm(x)

    @property
    def head(self) -> VocabularyEmbedding:
        """The module that scores hidden states; the embedding itself when tied."""
        return self.embedding if self.lm_head is None else self.lm_head


FAMILY = ModelFamily(parse_config=parse_config, build=Llama, tensor_names=TENSOR_NAMES)
