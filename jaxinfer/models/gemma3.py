"""Gemma 3 (text): Gemma 2 with norms of query and key heads instead of soft caps, and a rotary base for windows.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.gemma2 import GEMMA2_TENSOR_NAMES, parse_gemma
from jaxinfer.models.hf_config import parse_rope, require_count
from jaxinfer.models.qwen3 import QWEN3_TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily

GEMMA3_TENSOR_NAMES = QWEN3_TENSOR_NAMES | GEMMA2_TENSOR_NAMES


def _rotary_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json twice: with the rotary settings of layers without a window, and with those of layers with one.

    Both are spelled as Llama's.
    """
    others = {name: value for name, value in fields.items() if not name.startswith("rope_")}
    nested = fields.get("rope_parameters")
    if isinstance(nested, Mapping) and "full_attention" in nested:
        local = nested.get("sliding_attention") or {"rope_theta": 10000.0}
        return others | {"rope_parameters": nested["full_attention"]}, others | {"rope_parameters": local}
    spelled = {name: value for name, value in fields.items() if name.startswith("rope_")}
    base = fields.get("rope_local_base_freq")
    return others | {"rope_theta": 1e6} | spelled, others | {"rope_theta": 10000.0 if base is None else base}


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Gemma 3 text config.json; without `layer_types`, every sixth layer has no window.

    `sliding_window_pattern`, where present, replaces the six.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Gemma Team 2025, "Gemma 3 Technical Report", section 2; transformers' Gemma3ForCausalLM.
    """
    if fields.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention must be false, a decoder sees the past only")
    everywhere, local = _rotary_fields(fields)
    period = require_count({"sliding_window_pattern": 6, **fields}, "sliding_window_pattern")
    slide = [(layer + 1) % period != 0 for layer in range(require_count(fields, "num_hidden_layers"))]
    return parse_gemma({"sliding_window": 4096} | everywhere, slide=slide, qk_norm="head", local_rope=parse_rope(local))


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=GEMMA3_TENSOR_NAMES)
