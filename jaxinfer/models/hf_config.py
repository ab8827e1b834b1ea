"""Reading Hugging Face's config.json: required fields, defaults, rotary rules.

Owns: the two spellings of rotary settings (rope_parameters; rope_theta with rope_scaling) and the errors.
Does not know: any family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ROPE_KINDS, RopeConfig


def require(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field that must be there.

    Raises:
      ValueError: it is missing or null.
    """
    value = fields.get(name)
    if value is None:
        raise ValueError(f"config.json has no {name!r}, which architecture {fields.get('architectures')} needs")
    return value


def require_activation(fields: Mapping[str, Any], name: str, supported: str) -> None:
    """Refuses a feed-forward activation that the family does not have.

    Raises:
      ValueError: names the field, the supported value and the one found.
    """
    activation = fields.get(name, supported)
    if activation != supported:
        raise ValueError(f"config.json: {name} must be {supported!r}, got {activation!r}")


def parse_rope(fields: Mapping[str, Any], *, default_theta: float = 10000.0) -> RopeConfig:
    """Rotary settings of a config.json, in either spelling.

    Raises:
      ValueError: an unknown rule, or one that lacks a number.
    """
    settings = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    if kind != "default" and "factor" not in settings:
        raise ValueError(f"config.json: rope type {kind!r} needs a factor, got {dict(settings)}")
    optional = {
        name: settings[name]
        for name in ("attention_factor", "mscale", "mscale_all_dim", "truncate")
        if settings.get(name) is not None
    }
    numbers = {
        name: float(settings[name])
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        if settings.get(name) is not None
    }
    return RopeConfig(
        theta=float(settings.get("rope_theta", fields.get("rope_theta") or default_theta)),
        kind=kind,
        factor=float(settings.get("factor", 1.0)),
        original_max_len=settings.get("original_max_position_embeddings") or require(fields, "max_position_embeddings"),
        **numbers,
        **optional,
    )
