"""Sweeps: the same prompts under all combinations of some settings.

Owns: the combinations, how each setting is named in the table, the row of each sample.
Does not know: how outputs are generated.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.interventions import BoundIntervention
from jaxinfer.logits_functions import BoundLogitsFunction
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sites import Sites

logger = logging.getLogger("jaxinfer")
INTERVENTION = "intervention"
COLUMNS = ("prompt", "sample", "seed", "text", "num_tokens", "finish_reason", "logprob", "mean_logprob")
Reduction = tuple[str, Callable[[np.ndarray], Any]]
_LISTS = {
    *("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "capture", "interventions", "logits_processors"),
}
"""Fields that are lists themselves; to vary them, give a mapping of names to values."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One combination of a sweep.

    Args:
      shown: the value of each axis as the table shows it.
      params: the parameters.
    """

    shown: Mapping[str, Any]
    params: SamplingParams


def settings_of(fields: Mapping[str, Any], *, capture: Sequence[str] = ()) -> tuple[list[Setting], list[str]]:
    """All combinations of the fields of SamplingParams that have several values, and the names of these.

    Args:
      fields: by name: one value, a list (or range, or array) of values, or a mapping of names for the table to values.
        "intervention" stands for the interventions of a request: one, a list of them or None.
      capture: sites that are captured in addition.

    Raises:
      TypeError: an unknown field; the message names the nearest one.
      ValueError: a field has no value at all, or a value is outside its range.
    """
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in fields:
        if name not in (*known, INTERVENTION):
            raise unknown_keyword(name, [*known, INTERVENTION])
    if INTERVENTION in fields and "interventions" in fields:
        raise TypeError("pass intervention=[..] for several settings or interventions=[..] for all, not both")
    axes = {name: _values(name, value) for name, value in fields.items() if _is_axis(name, value)}
    fixed = {name: value for name, value in fields.items() if name not in axes}
    if INTERVENTION in fixed:
        fixed["interventions"] = _interventions(fixed.pop(INTERVENTION))
    if fixed.get("logprobs") is None and "logprobs" not in axes:
        fixed["logprobs"] = 0  # the table has the log-probability of each text
    settings = []
    for combination in itertools.product(*(values.items() for values in axes.values())):
        chosen = {name: value for name, (_, value) in zip(axes, combination, strict=True)}
        if INTERVENTION in chosen:
            chosen["interventions"] = _interventions(chosen.pop(INTERVENTION))
        if capture:
            own = chosen.get("capture", fixed.get("capture")) or ()
            chosen["capture"] = tuple(dict.fromkeys([*([own] if isinstance(own, str) else own), *capture]))
        shown = {name: label for name, (label, _) in zip(axes, combination, strict=True)}
        settings.append(Setting(shown, SamplingParams(**fixed | chosen)))
    return settings, list(axes)


def rows_of(
    output: RequestOutput, shown: Mapping[str, Any], reductions: Mapping[str, Reduction]
) -> Iterable[dict[str, Any]]:
    """A row for each sample of an output.

    Args:
      output: of one prompt.
      shown: the values of the axes.
      reductions: name of a column -> site and function of its captured values, float32[tokens, dims], that returns
        what the column has.
    """
    prompt = output.prompt if output.prompt is not None else str(list(output.prompt_token_ids))
    for sample in output.outputs:
        row = {"prompt": prompt, **shown, "sample": sample.index, "seed": sample.seed}
        row |= {"text": sample.text, "num_tokens": len(sample.token_ids), "finish_reason": sample.finish_reason}
        row |= {"logprob": sample.cumulative_logprob, "mean_logprob": _mean_logprob(sample)}
        yield row | {name: _reduced(name, sample, *entry) for name, entry in reductions.items()}


def check_reductions(reductions: Mapping[str, Any], sites: Callable[[], Sites], axes: Sequence[str]) -> None:
    """Refuses reductions of another form, for no or several sites, or that take the place of another column.

    Raises:
      TypeError, ValueError: the message names the reduction.
    """
    for name, entry in reductions.items():
        if name in (*COLUMNS, *axes):
            raise ValueError(f"reductions cannot have a column called {name!r}, there is one already")
        if not isinstance(entry, tuple) or len(entry) != 2 or not callable(entry[1]):
            raise TypeError(f"reductions[{name!r}] must be a tuple (site, function), got {entry!r}")
        found = [site.name for site in sites().find(entry[0])]
        if found != [entry[0]]:
            raise ValueError(f"reductions[{name!r}] must name one site, got {entry[0]!r} for {len(found)}")


def _reduced(name: str, sample: CompletionOutput, site: str, reduce: Callable[[np.ndarray], Any]) -> Any:
    """The value of a reduction. If its function raises, that is None, with a warning, so that no sample is lost."""
    try:
        return _plain(reduce((sample.captures or {})[site]))
    except Exception as error:  # whatever the user's function raises
        logger.warning("reduction %s of sample %d raised %s: %s", name, sample.index, type(error).__name__, error)
        return None


def _mean_logprob(sample: CompletionOutput) -> float | None:
    if sample.cumulative_logprob is None or not sample.token_ids:
        return None
    return sample.cumulative_logprob / len(sample.token_ids)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _is_axis(name: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return name not in ("logit_bias", "structured")
    if name in _LISTS or isinstance(value, (str, bytes, BoundIntervention)):
        return False
    return isinstance(value, Sequence) or np.ndim(value) > 0


def _values(name: str, value: Any) -> dict[Any, Any]:
    """The values of an axis by what the table shows of them."""
    if isinstance(value, Mapping):
        found = dict(value)
    else:
        found = {}
        for number, entry in enumerate(value):
            plain = _plain(entry)
            label = _label(plain) if name == INTERVENTION else _shown(plain)
            found[label if label not in found else f"{label} ({number})"] = plain
    if not found:
        raise ValueError(f"{name} has no values to sweep over, got {value!r}")
    return found


def _shown(value: Any) -> Any:
    """How the table shows a value."""
    if isinstance(value, BoundLogitsFunction):
        return " ".join([str(value.function), *_numbers(value.parameters)])
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _numbers(parameters: Mapping[str, np.ndarray]) -> list[str]:
    return [f"{name}={array.item():g}" for name, array in parameters.items() if array.ndim == 0]


def _label(entry: Any) -> str:
    """How the table shows the interventions of a request."""
    if entry is None:
        return "none"
    if isinstance(entry, BoundIntervention):
        return " ".join([f"{entry.intervention.name} at {entry.site}", *_numbers(entry.parameters)])
    if isinstance(entry, (list, tuple)) and all(isinstance(one, BoundIntervention) for one in entry):
        return ", ".join(map(_label, entry)) or "none"
    raise TypeError(f"intervention must be None, what Intervention.at returns, or a list of these, got {entry!r}")


def _interventions(entry: Any) -> Any:
    return (entry,) if isinstance(entry, BoundIntervention) else entry
