"""Reading Hugging Face's config.json: required fields, defaults, rotary rules.

Owns: the fields that Llama and its relatives share, the two spellings of rotary settings (rope_parameters, or
rope_theta with rope_scaling), which layers have a sliding window, and the errors.
Does not know: any single family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config.model_config import ROPE_KINDS, ModelConfig, RopeConfig
from jaxinfer.config.validation import require_bool, require_float, require_int

_OPTIONAL_NUMBERS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


def require(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a required field.

    Raises:
      ValueError: it is missing or null.
    """
    value = fields.get(name)
    if value is None:
        raise ValueError(f"config.json has no {name!r}, which architecture {fields.get('architectures')} needs")
    return value


def require_count(fields: Mapping[str, Any], name: str) -> int:
    """The value of a required field that must be an integer >= 1.

    Raises:
      TypeError, ValueError: it is missing, null or anything but such an integer; the message names it.
    """
    return require_int(f"config.json: {name}", require(fields, name), 1)


def optional_count(fields: Mapping[str, Any], name: str, default: int) -> int:
    """The value of a field that must be an integer >= 1 where it is there; default where it is missing or null.

    Raises:
      TypeError, ValueError: it is anything else; the message names it.
    """
    return default if fields.get(name) is None else require_count(fields, name)


def optional_flag(fields: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """The value of a field that must be true or false where it is there; null is false, as in transformers.

    Raises:
      TypeError: it is anything else, such as the string "false"; the message names it.
    """
    value = fields.get(name, default)
    if value is not None:
        require_bool(f"config.json: {name}", value)
    return bool(value)


def require_activation(fields: Mapping[str, Any], name: str, supported: str) -> None:
    """Refuses a config.json whose feed-forward activation is not the one supported for the family.

    Raises:
      ValueError: the message names the field, the supported value and the one found.
    """
    activation = fields.get(name, supported)
    if activation != supported:
        raise ValueError(f"config.json: {name} must be {supported!r}, got {activation!r}")


def parse_decoder(
    fields: Mapping[str, Any], *, activation: str = "silu", rope: RopeConfig | None = None, **features: Any
) -> ModelConfig:
    """The ModelConfig of a decoder with RMSNorm, rotary positions and a gated feed-forward.

    Args:
      fields: config.json.
      activation: of the gate, the only one that is supported for the family.
      rope: the rotary settings, for a family that reads them in its own way; None for parse_rope(fields).
      features: further fields of ModelConfig, set by the family.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported; the message names it.
    """
    require_activation(fields, "hidden_act", activation)
    num_heads, hidden_size = require_count(fields, "num_attention_heads"), require_count(fields, "hidden_size")
    return ModelConfig(
        architecture=require(fields, "architectures")[0],
        vocab_size=require_count(fields, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=require_count(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=optional_count(fields, "num_key_value_heads", num_heads),
        head_dim=optional_count(fields, "head_dim", hidden_size // num_heads),
        ffn_size=require_count(fields, "intermediate_size"),
        max_position_embeddings=require_count(fields, "max_position_embeddings"),
        rope=parse_rope(fields) if rope is None else rope,
        norm_eps=require_float("config.json: rms_norm_eps", fields.get("rms_norm_eps", 1e-6), ">= 0", 0, math.inf),
        tie_word_embeddings=optional_flag(fields, "tie_word_embeddings"),
        activation=activation,
        **features,
    )


def parse_windows(fields: Mapping[str, Any], *, first_layer: int) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, None for a layer without one; () when no layer has one.

    Args:
      fields: config.json. Its `layer_types`, where present, says which layers have a window.
      first_layer: without `layer_types`, the layers from this one on have a window.

    Raises:
      TypeError, ValueError: the window is not an integer >= 1, or layer_types does not fit the layers.
    """
    num_layers = require_count(fields, "num_hidden_layers")
    types = fields.get("layer_types")
    if types is None:
        types = ["full_attention"] * min(first_layer, num_layers)
        types += ["sliding_attention"] * (num_layers - len(types))
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"config.json: layer_types must be a list of {num_layers} names, got {types!r}")
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise ValueError(f"config.json: layer_types must be full_attention or sliding_attention, got {unknown[0]!r}")
    if "sliding_attention" not in types:
        return ()
    window = require_count(fields, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def parse_rope(
    fields: Mapping[str, Any], *, default_theta: float = 10000.0, may_be_partial: bool = False
) -> RopeConfig:
    """Rotary settings of a config.json, in either spelling.

    Args:
      fields: config.json.
      default_theta: base where the file names none.
      may_be_partial: whether the family may rotate only a part of every head.

    Raises:
      TypeError, ValueError: the rule is unknown, or one of its numbers is missing or wrong; the message names it.
    """
    settings = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"config.json: rotary settings must be an object, got {settings!r}")
    settings = {name: value for name, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # older files call longrope "su"
    if kind not in ROPE_KINDS:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    if kind not in ("default", "longrope") and "factor" not in settings:
        raise ValueError(f"config.json: rope type {kind!r} needs a factor, got {settings}")
    share = _first(settings.get("partial_rotary_factor"), fields.get("partial_rotary_factor"), 1)
    if share != 1 and not may_be_partial:
        raise ValueError("config.json: partial_rotary_factor must be 1, others are not supported")
    numbers = {
        name: require_float(f"config.json: rope {name}", settings[name], "finite", -math.inf, math.inf)
        for name in ("factor", *_OPTIONAL_NUMBERS)
        if name in settings
    }
    places = {"original_max_position_embeddings": fields.get("original_max_position_embeddings"), **settings}
    if places["original_max_position_embeddings"] is not None:
        original_max_len = require_count(places, "original_max_position_embeddings")
    else:
        original_max_len = require_count(fields, "max_position_embeddings")
    if kind == "longrope":
        numbers.setdefault("factor", require_count(fields, "max_position_embeddings") / original_max_len)
    theta = _first(settings.get("rope_theta"), fields.get("rope_theta"), default_theta)
    truncate = settings.get("truncate", True)
    require_bool("config.json: rope truncate", truncate)
    return RopeConfig(
        theta=require_float("config.json: rope_theta", theta, "> 0", 0, math.inf, open_low=True),
        kind=kind,
        original_max_len=original_max_len,
        truncate=truncate,
        short_factors=_factors(settings, "short_factor") if kind == "longrope" else (),
        long_factors=_factors(settings, "long_factor") if kind == "longrope" else (),
        rotated_share=require_float("config.json: partial_rotary_factor", share, "in (0, 1]", 0, 1, open_low=True),
        **numbers,
    )


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def _factors(settings: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = settings.get(name)
    if not isinstance(values, list):
        raise ValueError(f"config.json: rope type 'longrope' needs a list {name}, got {values!r}")
    return tuple(require_float(f"config.json: {name}", value, "> 0", 0, math.inf, open_low=True) for value in values)
