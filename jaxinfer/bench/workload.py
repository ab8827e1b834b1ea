"""Workloads: traces (the lengths and arrival times of requests) and random prompts.

Owns: reading traces from files and drawing them at random; a seed determines everything that is drawn.
Does not know: engines, clocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.config.validation import require_choice, require_float, require_int

DISTRIBUTIONS = ("uniform", "lognormal")
_TAIL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceEntry:
    """One request of a trace.

    Args:
      prompt_len, output_len: tokens, >= 1.
      arrival_time: seconds after the start, >= 0.

    Raises:
      TypeError, ValueError: a field is outside its range; the message names field, value and range.
    """

    prompt_len: int
    output_len: int
    arrival_time: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt_len", "output_len"):
            object.__setattr__(self, name, require_int(name, getattr(self, name), 1))
        seconds = require_float("arrival_time", self.arrival_time, ">= 0 seconds", 0, math.inf)
        object.__setattr__(self, "arrival_time", seconds)


def read_trace(file: Path) -> list[TraceEntry]:
    """The requests of a JSONL file, with one object {"prompt_len", "output_len"[, "arrival_time"]} per line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is wrong, or there is none; the message names the file and the line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such trace file: {file}")
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                entries.append(_entry(json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
    if not entries:
        raise ValueError(f"{file} holds no requests; expected one JSON object a line")
    return entries


def _entry(fields: Any) -> TraceEntry:
    known = [field.name for field in dataclasses.fields(TraceEntry)]
    if not isinstance(fields, dict):
        raise TypeError(f"expected a JSON object, got {fields!r}")
    for name in fields:
        if name not in known:
            raise unknown_keyword(name, known)
    for name in ("prompt_len", "output_len"):
        if name not in fields:
            raise ValueError(f"{name} is missing")
    return TraceEntry(**fields)


def draw_trace(
    num_requests: int, *, distribution: str, prompt_len: int, output_len: int, spread: float, seed: int
) -> list[TraceEntry]:
    """Requests whose lengths are drawn around given means and which all arrive at the start.

    Args:
      num_requests: how many.
      distribution: "uniform" from mean * (1 - spread) to mean * (1 + spread), or "lognormal" with the given mean and
        sigma = spread; longer values than four times the mean are cut to that.
      prompt_len, output_len: mean lengths in tokens.
      spread: from 0 to 1; 0 gives every request the mean lengths.
      seed: of the random numbers.

    Raises:
      TypeError, ValueError: an argument is outside its range.
    """
    require_choice("distribution", distribution, DISTRIBUTIONS)
    require_float("spread", spread, "in [0, 1]", 0, 1)
    require_int("num_requests", num_requests, 1)
    rng = np.random.default_rng((seed, 0))
    draw = {"uniform": _uniform, "lognormal": _lognormal}[distribution]
    prompts, outputs = (
        _lengths(draw(rng, require_int(name, mean, 1), spread, num_requests), _TAIL * mean)
        for name, mean in (("prompt_len", prompt_len), ("output_len", output_len))
    )
    return [TraceEntry(prompt_len=p, output_len=o) for p, o in zip(prompts, outputs, strict=True)]


def _uniform(rng: np.random.Generator, mean: int, spread: float, count: int) -> np.ndarray:
    return rng.uniform(mean * (1 - spread), mean * (1 + spread), count)


def _lognormal(rng: np.random.Generator, mean: int, spread: float, count: int) -> np.ndarray:
    return rng.lognormal(math.log(mean) - spread**2 / 2, spread, count)


def _lengths(values: np.ndarray, longest: int) -> list[int]:
    return np.clip(np.rint(values), 1, longest).astype(int).tolist()


def with_poisson_arrivals(trace: Sequence[TraceEntry], request_rate: float, seed: int) -> list[TraceEntry]:
    """The trace with Poisson arrivals: exponentially distributed gaps between neighbouring requests.

    Args:
      trace: the requests in the order of arrival.
      request_rate: mean requests per second, > 0.
      seed: of the gaps.

    Raises:
      TypeError, ValueError: request_rate is not a positive number.
    """
    require_float("request_rate", request_rate, "> 0 requests per second", 0, math.inf, open_low=True)
    times = np.cumsum(np.random.default_rng((seed, 1)).exponential(1 / request_rate, len(trace)))
    return [dataclasses.replace(entry, arrival_time=float(time)) for entry, time in zip(trace, times, strict=True)]


def random_prompts(
    lengths: Sequence[int], *, vocab_size: int, seed: Sequence[int], prefix_len: int = 0
) -> list[tuple[int, ...]]:
    """Prompts of uniformly drawn token ids; equal seeds give equal prompts.

    Args:
      lengths: tokens of each prompt.
      vocab_size: token ids are drawn below this number.
      seed: numbers that together seed the draw.
      prefix_len: leading tokens that all prompts share.
    """
    rng = np.random.default_rng((*seed, 2))
    prefix = rng.integers(vocab_size, size=prefix_len).tolist()
    draw: Callable[[int], list[int]] = lambda length: rng.integers(vocab_size, size=length).tolist()  # noqa: E731
    return [tuple((prefix + draw(length))[:length]) for length in lengths]
