"""Qwen3 (dense): Llama with an RMSNorm of every query and key head.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_flag, parse_decoder
from jaxinfer.models.llama import TENSOR_NAMES
from jaxinfer.models.qwen2 import parse_upper_windows
from jaxinfer.models.registry import ModelFamily

QWEN3_TENSOR_NAMES = TENSOR_NAMES | {
    "layers.{layer}.attention.query_norm.weight": ("model.layers.{layer}.self_attn.q_norm.weight",),
    "layers.{layer}.attention.key_norm.weight": ("model.layers.{layer}.self_attn.k_norm.weight",),
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3 config.json.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Yang et al. 2025, "Qwen3 Technical Report", section 2; transformers' Qwen3ForCausalLM.
    """
    bias = optional_flag(fields, "attention_bias")
    windows = parse_upper_windows(fields)
    return parse_decoder(
        {"head_dim": 128, **fields}, attention_bias=bias, attention_out_bias=bias, qk_norm="head", windows=windows
    )


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=QWEN3_TENSOR_NAMES)
