"""Phi-3, Phi-3.5 and Phi-4-mini: Llama whose checkpoints store q, k, v as one tensor, and gate and up as another.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import parse_decoder, parse_rope, parse_windows
from jaxinfer.models.llama import TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily

PHI3_TENSOR_NAMES = TENSOR_NAMES | {
    "layers.{layer}.attention.qkv.weight": ("model.layers.{layer}.self_attn.qkv_proj.weight",),
    "layers.{layer}.mlp.gate_up.weight": ("model.layers.{layer}.mlp.gate_up_proj.weight",),
}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Phi-3 config.json; `sliding_window`, if any, holds for every layer.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Abdin et al. 2024, "Phi-3 Technical Report", section 2; transformers' Phi3ForCausalLM.
    """
    windows = parse_windows(fields, first_layer=0) if fields.get("sliding_window") is not None else ()
    return parse_decoder(
        {"rms_norm_eps": 1e-5, **fields}, rope=parse_rope(fields, may_be_partial=True), windows=windows
    )


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=PHI3_TENSOR_NAMES)
