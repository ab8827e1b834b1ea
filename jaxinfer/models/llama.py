"""Llama: RMSNorm, grouped-query attention with rotary positions, SwiGLU.

Owns: how the family's config.json is read, and its checkpoint names, which most later families share.
Does not know: how a layer computes (models/decoder.py), files.

Source: Touvron et al. 2023; Hugging Face transformers' LlamaForCausalLM, against whose results it is tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_flag, parse_decoder
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
    attention_bias = optional_flag(fields, "attention_bias")
    return parse_decoder(
        fields,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=optional_flag(fields, "mlp_bias"),
    )


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=TENSOR_NAMES)
