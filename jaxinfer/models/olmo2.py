"""OLMo 2: Llama with its norms after every block instead of before, and norms of queries and keys over all heads.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_flag, parse_decoder
from jaxinfer.models.qwen3 import QWEN3_TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily

OLMO2_TENSOR_NAMES = QWEN3_TENSOR_NAMES | {
    "layers.{layer}.attention_post_norm.weight": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "layers.{layer}.mlp_post_norm.weight": ("model.layers.{layer}.post_feedforward_layernorm.weight",),
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of an OLMo 2 config.json.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Team OLMo 2025, "2 OLMo 2 Furious", section 3; transformers' Olmo2ForCausalLM.
    """
    bias = optional_flag(fields, "attention_bias")
    return parse_decoder(
        {"rms_norm_eps": 1e-5, **fields},
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="projection",
        norm_places="after",
    )


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=OLMO2_TENSOR_NAMES)
