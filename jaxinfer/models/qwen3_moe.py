"""Qwen3-MoE: Qwen3 with a mixture of experts in place of most or all feed-forwards.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_flag, parse_decoder, parse_windows, require_count
from jaxinfer.models.qwen3 import QWEN3_TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily

_EXPERTS = "model.layers.{layer}.mlp.experts.{expert}"
QWEN3_MOE_TENSOR_NAMES = QWEN3_TENSOR_NAMES | {
    "layers.{layer}.mlp.router": ("model.layers.{layer}.mlp.gate.weight",),
    "layers.{layer}.mlp.gate_up": (f"{_EXPERTS}.gate_proj.weight", f"{_EXPERTS}.up_proj.weight"),
    "layers.{layer}.mlp.down": (f"{_EXPERTS}.down_proj.weight",),
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json; `mlp_only_layers` and `decoder_sparse_step` say where experts are.

    Newer files call `num_experts` `num_local_experts`, as Mixtral's do.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Yang et al. 2025, "Qwen3 Technical Report", section 2; transformers' Qwen3MoeForCausalLM.
    """
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"config.json: mlp_only_layers must be a list of layer numbers, got {dense!r}")
    step = require_count({"decoder_sparse_step": 1, **fields}, "decoder_sparse_step")
    num_layers = require_count(fields, "num_hidden_layers")
    bias = optional_flag(fields, "attention_bias")
    count = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    return parse_decoder(
        fields,
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        windows=parse_windows(fields, first_layer=0) if optional_flag(fields, "use_sliding_window") else (),
        num_experts=require_count(fields, count),
        experts_per_token=require_count(fields, "num_experts_per_tok"),
        expert_ffn_size=require_count(fields, "moe_intermediate_size"),
        normalise_experts=optional_flag(fields, "norm_topk_prob"),
        dense_layers=tuple(layer for layer in range(num_layers) if layer in dense or (layer + 1) % step),
    )


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=QWEN3_MOE_TENSOR_NAMES)
