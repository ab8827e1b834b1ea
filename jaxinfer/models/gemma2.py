"""Gemma 2: Llama with norms before and after every block, soft caps, and a sliding window on every other layer.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.config.validation import require_float
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_flag, parse_decoder, parse_windows, require_count
from jaxinfer.models.llama import TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily

GEMMA2_TENSOR_NAMES = TENSOR_NAMES | {
    "layers.{layer}.attention_post_norm.weight": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "layers.{layer}.mlp_norm.weight": ("model.layers.{layer}.pre_feedforward_layernorm.weight",),
    "layers.{layer}.mlp_post_norm.weight": ("model.layers.{layer}.post_feedforward_layernorm.weight",),
}


def parse_gemma(fields: Mapping[str, Any], *, slide: list[bool], **features: Any) -> ModelConfig:
    """The ModelConfig of a Gemma 2 or 3, with everything the two share.

    Args:
      fields: config.json, with rotary settings spelled as Llama's.
      slide: for each layer, whether it has a sliding window; `layer_types`, where present, takes precedence.
      features: further fields of ModelConfig, set by the family.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.
    """
    kinds = ["sliding_attention" if slides else "full_attention" for slides in slide]
    fields = {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, **fields}
    activation = fields.get("hidden_activation") or "gelu_pytorch_tanh"
    scalar = require_float(
        "config.json: query_pre_attn_scalar", fields["query_pre_attn_scalar"], "> 0", 0, float("inf"), open_low=True
    )
    bias = optional_flag(fields, "attention_bias")
    return parse_decoder(
        fields | {"hidden_act": activation},
        activation="gelu_pytorch_tanh",
        windows=parse_windows({"layer_types": kinds} | fields, first_layer=0),
        attention_bias=bias,
        attention_out_bias=bias,
        attention_scale=scalar**-0.5,
        attention_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        embedding_scale=require_count(fields, "hidden_size") ** 0.5,
        norm_places="both",
        norm_offset=1.0,
        **features,
    )


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Gemma 2 config.json; without `layer_types`, layers 0, 2, 4, ... have a window.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Gemma Team 2024, "Gemma 2", section 2; transformers' Gemma2ForCausalLM.
    """
    slide = [layer % 2 == 0 for layer in range(require_count(fields, "num_hidden_layers"))]
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
    return parse_gemma(caps | dict(fields), slide=slide)


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=GEMMA2_TENSOR_NAMES)
