"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and optional windows on the upper layers.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.config.validation import require_int
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import optional_flag, parse_decoder, parse_windows, require
from jaxinfer.models.llama import TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily


def parse_upper_windows(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window as Qwen configures it; () unless `use_sliding_window` is true.

    `layer_types`, where present, says which layers have a window; else those from `max_window_layers` on have one.

    Raises:
      TypeError, ValueError: a window or a count of layers is wrong; the message names it.
    """
    if not optional_flag(fields, "use_sliding_window"):
        return ()
    if "layer_types" in fields:
        return parse_windows(fields, first_layer=0)
    return parse_windows(
        fields, first_layer=require_int("config.json: max_window_layers", require(fields, "max_window_layers"), 0)
    )


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen2 config.json.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Yang et al. 2024, "Qwen2 Technical Report", section 2.2; transformers' Qwen2ForCausalLM.
    """
    return parse_decoder(fields, attention_bias=True, windows=parse_upper_windows(fields))


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=TENSOR_NAMES)
