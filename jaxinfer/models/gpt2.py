"""GPT-2: LayerNorm, learned positions, a feed-forward without a gate, biases everywhere; Megatron's classic GPT.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ACTIVATIONS, ModelConfig
from jaxinfer.config.validation import require_choice, require_float
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_count, optional_flag, require, require_count
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
# Fields of which only one value is supported: the default of transformers' GPT2LMHeadModel, which a file may omit.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a GPT-2 config.json.

    `reorder_and_upcast_attn` is ignored: it changes rounding only, and scores are always float32 here.

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
        ffn_size=optional_count(fields, "n_inner", 4 * hidden_size),
        max_position_embeddings=require_count(fields, "n_positions"),
        rope=None,
        norm_eps=require_float(
            "config.json: layer_norm_epsilon", fields.get("layer_norm_epsilon", 1e-5), ">= 0", 0, math.inf
        ),
        tie_word_embeddings=optional_flag(fields, "tie_word_embeddings", default=True),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        activation=activation,
        mlp_gate=False,
        norm_kind="layer",
    )


FAMILY = ModelFamily(
    parse_config=parse_config,
    build=TransformerDecoder,
    tensor_names=TENSOR_NAMES,
    transposed=frozenset(f"layers.{{layer}}.{ours}.weight" for ours in _LINEARS),
    base_prefix=_PREFIX,
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
