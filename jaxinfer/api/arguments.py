"""Normalises what callers may pass as prompts and parameters: one of them, or a list.

Owns: telling one prompt from a list of prompts, and one set of parameters for all prompts from a list with one for
each; the errors about wrong ones.
Does not know: models, engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxinfer.sampling_params import BeamSearchParams, SamplingParams

_Params = TypeVar("_Params", SamplingParams, BeamSearchParams)


def as_prompts(prompts: object) -> tuple[list[Any], bool]:
    """Returns the prompts as a list, and whether the caller gave a single prompt rather than a list of them.

    Raises:
      TypeError: prompts is neither text nor a sequence.

    Example:
      >>> as_prompts("hello"), as_prompts([1, 2, 3]), as_prompts(["hello"])
      ((['hello'], True), ([[1, 2, 3]], True), (['hello'], False))
    """
    if isinstance(prompts, str):
        return [prompts], True
    entries = _as_sequence(prompts)
    if entries and (not hasattr(entries[0], "__iter__") or getattr(entries[0], "ndim", 1) == 0):
        return [entries], True
    return entries, False


def checked(name: str, params: object, kind: type[_Params]) -> _Params:
    """Returns params if they are an instance of kind.

    Raises:
      TypeError: they are not; the message names the argument.
    """
    if not isinstance(params, kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(params).__name__}")
    return params


def one_each(name: str, prompts: Sequence[Any], params: Any, kind: type[_Params]) -> list[_Params]:
    """Returns one set of parameters per prompt.

    Args:
      name: the argument's name, for error messages.
      prompts: the prompts.
      params: one instance of kind for all prompts, or a list with one for each.
      kind: the class of the parameters.

    Raises:
      TypeError: params are of another class.
      ValueError: there are not as many of them as prompts.
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
    if hasattr(values, "tolist"):  # an array's rows and numbers
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not hasattr(values, "__iter__"):
        raise TypeError(f"expected a string, token ids, or a list of either, got {type(values).__name__}")
    return list(values)
