"""What callers may pass as prompts and parameters.

Owns: telling one prompt from several, one set of parameters for all from one each, and the errors about that.
Does not know: models, engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxinfer.sampling_params import BeamSearchParams, SamplingParams

_Params = TypeVar("_Params", SamplingParams, BeamSearchParams)


def as_prompts(prompts: object) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether there was only one, not in a list.

    Raises:
      TypeError: neither text nor a sequence.
    """
    if isinstance(prompts, str):
        return [prompts], True
    entries = _as_sequence(prompts)
    if entries and not isinstance(entries[0], str) and not hasattr(entries[0], "__iter__"):
        return [entries], True
    return entries, False


def checked(name: str, params: object, kind: type[_Params]) -> _Params:
    """The parameters, if they are of their kind.

    Raises:
      TypeError: they are not; the message names the argument.
    """
    if not isinstance(params, kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(params).__name__}")
    return params


def one_each(name: str, prompts: Sequence[Any], params: Any, kind: type[_Params]) -> list[_Params]:
    """The parameters of every prompt, from one for all or one for each.

    Raises:
      TypeError, ValueError: another kind, or another number of them.
    """
    if isinstance(params, kind):
        return [params] * len(prompts)
    if isinstance(params, (str, Mapping)) or not hasattr(params, "__iter__"):
        raise TypeError(f"{name} must be {kind.__name__}, one or a list of one each, got {type(params).__name__}")
    entries = [checked(name, entry, kind) for entry in params]
    if len(entries) != len(prompts):
        raise ValueError(f"got {len(entries)} {name} for {len(prompts)} prompts; pass one, or one each")
    return entries


def score_params(prompt_logprobs: int) -> SamplingParams:
    """Parameters that score a prompt and generate nothing."""
    return SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=prompt_logprobs)


def _as_sequence(values: Any) -> list[Any]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"expected a string, token ids, or a list of either, got {type(values).__name__}")
    return list(values)
