"""Mistral: Llama with an optional sliding window on every layer.

Owns: how the family's config.json is read, and its checkpoint names.
Does not know: how a layer computes (models/decoder.py), files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.hf_config import parse_decoder, parse_windows
from jaxinfer.models.llama import TENSOR_NAMES
from jaxinfer.models.registry import ModelFamily


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mistral config.json; `sliding_window`, if any, holds for every layer.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.

    Source: Jiang et al. 2023, "Mistral 7B", section 2; transformers' MistralForCausalLM.
    """
    windows = parse_windows(fields, first_layer=0) if fields.get("sliding_window") is not None else ()
    return parse_decoder(fields, windows=windows)


FAMILY = ModelFamily(parse_config=parse_config, build=TransformerDecoder, tensor_names=TENSOR_NAMES)
