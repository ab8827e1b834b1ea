"""Mixtral: Mistral with a mixture of experts in place of every feed-forward.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import parse_decoder, parse_rope, parse_windows, require_count
from jaxinfer.models.llama import TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily

_EXPERTS = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
MIXTRAL_TENSOR_NAMES = TENSOR_NAMES | {
    "layers.{layer}.mlp.router": ("model.layers.{layer}.block_sparse_moe.gate.weight",),
    "layers.{layer}.mlp.gate_up": (f"{_EXPERTS}.w1.weight", f"{_EXPERTS}.w3.weight"),
    "layers.{layer}.mlp.down": (f"{_EXPERTS}.w2.weight",),
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mixtral config.json; `intermediate_size` is the feed-forward size of each expert.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Jiang et al. 2024, "Mixtral of Experts", section 2; transformers' MixtralForCausalLM.
    """
    return parse_decoder(
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, **fields},
        rope=parse_rope(fields, default_theta=1e6),
        windows=parse_windows(fields, first_layer=0) if fields.get("sliding_window") is not None else (),
        num_experts=require_count(fields, "num_local_experts"),
        experts_per_token=require_count(fields, "num_experts_per_tok"),
        expert_ffn_size=require_count(fields, "intermediate_size"),
    )


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=MIXTRAL_TENSOR_NAMES)
