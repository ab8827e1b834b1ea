"""Keywords that set fields of SamplingParams and EngineConfig together, as generate() and the command line take them.

Owns: which field a keyword sets.
Does not know: what a field does; models, JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.sampling_params import SamplingParams

_SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_ENGINE_FIELDS = {field.name for field in dataclasses.fields(EngineConfig)}


def split_settings(fields: Mapping[str, Any], *, also_known: Sequence[str] = ()) -> tuple[dict[str, Any], EngineConfig]:
    """Splits keywords into the fields of SamplingParams and an EngineConfig; `seed` is the sampling seed.

    Args:
      fields: values of fields of SamplingParams and EngineConfig, by name.
      also_known: further names that the error about an unknown name may suggest.

    Returns:
      The given fields of SamplingParams, checked, without defaults for the others; and the EngineConfig.

    Raises:
      TypeError, ValueError: a field is unknown or has a wrong value.
    """
    known = _SAMPLING_FIELDS | _ENGINE_FIELDS
    for name in fields:
        if name not in known:
            raise unknown_keyword(name, sorted({*known, *also_known}))
    sampling = {name: value for name, value in fields.items() if name in _SAMPLING_FIELDS}
    SamplingParams(**sampling)  # refuses a wrong value now, before the caller loads a model
    return sampling, EngineConfig(**{name: fields[name] for name in fields if name not in sampling})
