"""GPT-2: LayerNorm, learned positions, a feed-forward without a gate, biases everywhere; Megatron's classic GPT.

Owns: the family's layer order, its config.json fields and its checkpoint names.
Does not know: files, batches' origin, sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.config import ACTIVATIONS, ModelConfig, require_choice, require_float
from jaxinfer.layers.attention import Attention, TokenBatch
from jaxinfer.layers.embedding import PositionEmbedding, VocabularyEmbedding
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.hf_config import require, require_count
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import ModelFamily

_PREFIX = "transformer."
_LINEARS = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
TENSOR_NAMES = {
    "embedding.weight": (f"{_PREFIX}wte.weight",),
    "positions.weight": (f"{_PREFIX}wpe.weight",),
    "norm.weight": (f"{_PREFIX}ln_f.weight",),
    "norm.bias": (f"{_PREFIX}ln_f.bias",),
    "lm_head.weight": ("lm_head.weight",),
} | {
    f"layers.{{layer}}.{ours}.{kind}": (f"{_PREFIX}h.{{layer}}.{theirs}.{kind}",)
    for ours, theirs in (_LINEARS | _NORMS).items()
    for kind in ("weight", "bias")
}
# What must be so, as transformers' GPT2LMHeadModel has it, and what a file without the field means.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a GPT-2 config.json. (`reorder_and_upcast_attn` changes rounding only; scores are float32 here.)

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; transformers'
    GPT2LMHeadModel.
    """
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"config.json: {name} must be {value}, got {fields[name]!r}")
    activation = fields.get("activation_function", "gelu_new")
    require_choice("config.json: activation_function", activation, ACTIVATIONS)
    num_heads, hidden_size = require_count(fields, "n_head"), require_count(fields, "n_embd")
    if hidden_size % num_heads:
        raise ValueError(f"config.json: n_embd must be a multiple of n_head, got {hidden_size} and {num_heads}")
    return ModelConfig(
        architecture=require(fields, "architectures")[0],
        vocab_size=require_count(fields, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=require_count(fields, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=require_count(fields, "n_inner") if fields.get("n_inner") is not None else 4 * hidden_size,
        max_position_embeddings=require_count(fields, "n_positions"),
        rope=None,
        norm_eps=require_float(
            "config.json: layer_norm_epsilon", fields.get("layer_norm_epsilon", 1e-5), ">= 0", 0, math.inf
        ),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", True)),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        activation=activation,
        mlp_gate=False,
        norm_kind="layer",
    )


class GPT2Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); arguments as GPT2's."""

    def __init__(self, config: ModelConfig, layout: Layout):
        size, stages, dtype = config.hidden_size, layout.num_stages, layout.dtype
        self.attention_norm = LayerNorm(size, eps=config.norm_eps, num_stages=stages, dtype=dtype)
        self.attention = Attention(
            config,
            num_stages=stages,
            num_shards=layout.num_shards,
            kv_copies=layout.kv_copies(config),
            windows=(None,),
            backend=layout.attention_backend,
            dtype=dtype,
        )
        self.mlp_norm = LayerNorm(size, eps=config.norm_eps, num_stages=stages, dtype=dtype)
        self.mlp = MLP(
            size,
            config.ffn_size,
            num_stages=stages,
            dtype=dtype,
            bias=config.mlp_bias,
            activation=config.activation,
            backend=layout.attention_backend,
        )

    def __call__(
        self, x: Float[Array, "T D"], cache: LayerCache, batch: TokenBatch
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """One layer of one stage; returns the new residual stream and the written cache."""
        x, cache = self.attention(x, cache, batch, None, norm=self.attention_norm)
        return self.mlp(x, norm=self.mlp_norm), cache


class GPT2(nnx.Module):
    """A GPT-2 model whose local layer j of every stage is stacked in layers[j].

    Args:
      config: the model's numbers.
      layout: mesh sizes, dtype and attention backend.

    Source: as parse_config's.
    """

    def __init__(self, config: ModelConfig, layout: Layout):
        num_devices = layout.num_stages * layout.num_shards

        def table() -> VocabularyEmbedding:
            return VocabularyEmbedding(
                config.vocab_size, config.hidden_size, num_shards=num_devices, dtype=layout.dtype
            )

        self.embedding = table()
        self.positions = PositionEmbedding(config.max_position_embeddings, config.hidden_size, dtype=layout.dtype)
        self.layers = nnx.List([GPT2Layer(config, layout) for _ in range(layout.layers_per_stage(config))])
        self.norm = LayerNorm(config.hidden_size, eps=config.norm_eps, num_stages=None, dtype=layout.dtype)
        self.lm_head = None if config.tie_word_embeddings else table()

    def embed(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token ids and positions to the residual stream."""
        return self.embedding.embed(token_ids) + self.positions(positions)

    def run_layers(
        self, x: Float[Array, "T D"], caches: Sequence[LayerCache], batch: TokenBatch
    ) -> tuple[Float[Array, "T D"], list[LayerCache]]:
        """This stage's layers; caches are one a local layer and come back written."""
        written = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache, batch)
            written.append(cache)
        return x, written

    def final_norm(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """The norm in front of the head."""
        return self.norm(x)

    @property
    def head(self) -> VocabularyEmbedding:
        """The module that scores hidden states; the embedding itself when tied."""
        return self.embedding if self.lm_head is None else self.lm_head


FAMILY = ModelFamily(
    parse_config=parse_config,
    build=GPT2,
    tensor_names=TENSOR_NAMES,
    transposed=frozenset(f"layers.{{layer}}.{ours}.weight" for ours in _LINEARS),
    base_prefix=_PREFIX,
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
