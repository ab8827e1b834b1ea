"""The fields of a request's body, taken one by one.

Owns: which fields mean sampling, which say only who asks and are ignored, and the errors about all others; the forms
in which OpenAI's API and vLLM's ask for structured output.
Does not know: what an interface's own fields mean.

A field that is null counts as not given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.config.validation import require_bool
from jaxinfer.sampling_params import IN_PYTHON_ONLY, SamplingParams

SAMPLING_FIELDS = {entry.name for entry in dataclasses.fields(SamplingParams)} - IN_PYTHON_ONLY - {"structured"}
_WHO_ASKS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "request_id",
    "cache_control",
    "inference_geo",
}
"""Fields that change nothing in the answer."""
_FORMS = {"response_format", "structured_outputs"}
_INSTEAD = {
    "guided_json": "structured_outputs: {json: ..}",
    "guided_regex": "structured_outputs: {regex: ..}",
    "guided_choice": "structured_outputs: {choice: ..}",
    "guided_grammar": "structured_outputs: {grammar: ..}",
    "functions": "tools",
    "function_call": "tool_choice",
    "use_beam_search": "n and temperature; beam search is there in Python alone",
}


class Fields:
    """The fields of one body.

    Args:
      body: the body.
      own: has the interface's own fields as its annotations.
      sampling: whether the fields of SamplingParams, response_format and structured_outputs are fields, too.

    Raises:
      TypeError: a field is unknown; the message names the nearest known one.
    """

    def __init__(self, body: Mapping[str, Any], *own: type, sampling: bool = True):
        known = {name for one in own for name in one.__annotations__} | {"model"}
        known |= SAMPLING_FIELDS | _FORMS if sampling else set()
        for name in body:
            if name in _INSTEAD and name not in known:
                raise TypeError(f"unknown argument {name!r}; use {_INSTEAD[name]}")
            if name not in known and name not in _WHO_ASKS:
                raise unknown_keyword(name, sorted(known))
        self._given = {name: value for name, value in body.items() if value is not None and name not in _WHO_ASKS}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, which is then gone."""
        return self._given.pop(name, default)

    def drop(self, values: Mapping[str, Any]) -> None:
        """Takes fields as not given that have these values."""
        for name, value in values.items():
            if self._given.get(name) == value:
                del self._given[name]

    def take_bool(self, name: str, default: bool = False) -> bool:
        """As take, for what must be true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {value!r:.80}")
        return value

    def take_mapping(self, name: str) -> dict[str, Any]:
        """As take, for what must be an object; empty if it is not given."""
        value = self.take(name, {})
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be an object, got {value!r:.80}")
        return dict(value)

    def take_list(self, name: str) -> list[Any]:
        """As take, for what must be a list; empty if it is not given."""
        value = self.take(name, [])
        if not isinstance(value, list):
            raise TypeError(f"{name} must be a list, got {value!r:.80}")
        return value

    def take_only(self, name: str, *allowed: Any) -> None:
        """Refuses all values but some, which are those that change nothing."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name} must be {allowed[0]!r}, got {value!r:.80}; nothing else is supported")

    def take_params(self, defaults: SamplingParams) -> SamplingParams:
        """What the fields of sampling that are left make of the defaults.

        Raises:
          TypeError, ValueError: one of them is wrong.
        """
        given, self._given = self._given, {}
        forms = [form for name in sorted(_FORMS) if (form := _structured(name, given.pop(name, None))) is not None]
        if len(forms) > 1:
            raise ValueError("response_format and structured_outputs exclude each other, got both")
        if isinstance(given.get("logit_bias"), Mapping):
            given["logit_bias"] = {
                int(token) if isinstance(token, str) and token.isdecimal() else token: bias
                for token, bias in given["logit_bias"].items()
            }
        return dataclasses.replace(defaults, structured=forms[0] if forms else None, **given)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """What a stream brings beside the text.

    Args:
      include_usage: a last chunk with the numbers of tokens.
      continuous_usage_stats: these numbers in every chunk.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            require_bool(f"stream_options.{entry.name}", getattr(self, entry.name))

    @classmethod
    def take(cls, fields: Fields, *, stream: bool) -> StreamOptions:
        """Reads stream_options.

        Raises:
          TypeError, ValueError: an option is unknown or wrong, or there is no stream.
        """
        given = fields.take_mapping("stream_options")
        if given and not stream:
            raise ValueError("stream_options needs stream: true")
        given.pop("include_obfuscation", None)
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise unknown_keyword(name, known)
        return cls(**{name: value for name, value in given.items() if value is not None})


def _structured(name: str, form: Any) -> dict[str, Any] | None:
    if form is None:
        return None
    if name == "structured_outputs":
        return _by_vllm(form)
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": {}}
    if kind == "json_schema" and isinstance(form.get("json_schema"), Mapping) and "schema" in form["json_schema"]:
        return {"json": form["json_schema"]["schema"]}
    raise ValueError(f'response_format must have the type "text", "json_object" or "json_schema", got {form!r:.200}')


def _by_vllm(form: Any) -> dict[str, Any]:
    if not isinstance(form, Mapping):
        raise TypeError(f"structured_outputs must be an object, got {form!r:.80}")
    given = {key: value for key, value in form.items() if value is not None and value is not False}
    if given.pop("json_object", None):
        given["json"] = {}
    if "grammar" in given:
        given["lark"] = given.pop("grammar")
    return given
