"""`jaxinfer ablate`: one workload under several engine settings; what each changes in speed, memory and outputs.

Owns: the form of an ablation's file, running its settings one after the other, comparing their outputs.
Does not know: what a setting does.

Settings that change no arithmetic, or only in which order a float32 sum is made, must give the same tokens: `outputs:
equal` in the file says so, and a difference is an error. Where they need not (dtype, attention backend), `outputs:
close` reports how far they are apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.bench.report import format_table
from jaxinfer.bench.session import Session, Target, engine_config
from jaxinfer.bench.workload import TraceEntry, draw_trace, random_prompts
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.config.validation import require_choice, require_float, require_int
from jaxinfer.models.registry import parse_model_config
from jaxinfer.request import Request
from jaxinfer.sampling_params import MAX_FLOAT32

OUTPUTS = ("equal", "close")
_MIB = 2**20
MAX_RUNS = 8
"""Times `repeats`: how many runs are made at most, since those in which something is compiled do not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The requests of an ablation.

    Args:
      num_requests: how many, all at once, >= 1.
      prompt_len, output_len: mean lengths in tokens, >= 1.
      spread: half the width of the lengths over their mean, 0 .. 1.
      prefix_len: leading tokens that all prompts share, below prompt_len: a prompt that is not longer than the prefix
        has no tokens of its own.
      temperature: of all requests, each with a seed of its own, >= 0.
      seed: of prompts and lengths, >= 0.

    Raises:
      TypeError, ValueError: a field is outside its range; the message names field, value and range.
    """

    num_requests: int = 32
    prompt_len: int = 96
    output_len: int = 32
    spread: float = 0.5
    prefix_len: int = 0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "prompt_len", "output_len"):
            require_int(f"workload.{name}", getattr(self, name), 1)
        require_float("workload.spread", self.spread, "in [0, 1]", 0, 1)
        require_int("workload.prefix_len", self.prefix_len, 0)
        if self.prefix_len >= self.prompt_len:
            raise ValueError(
                f"workload.prefix_len must be below prompt_len, got {self.prefix_len} and {self.prompt_len}; "
                "most prompts would be the same text"
            )
        require_float("workload.temperature", self.temperature, f"in [0, {MAX_FLOAT32:g}]", 0, MAX_FLOAT32)
        require_int("workload.seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """What an ablation's file says.

    Args:
      title: a line about it.
      model: a checkpoint directory, hub id or "demo".
      random_weights: a config.json, to run that shape with random weights instead.
      workload: the requests.
      engine: settings that all runs have.
      vary: settings by name, each with its values; all combinations are run, the first of which is the baseline.
      outputs: "equal" if all runs must give the baseline's tokens, "close" if they need not.

    Raises:
      TypeError, ValueError: a field is wrong; the message names it.
    """

    title: str
    vary: Mapping[str, Sequence[Any]]
    model: str = DEMO
    random_weights: str | None = None
    workload: Workload = field(default_factory=Workload)
    engine: Mapping[str, Any] = field(default_factory=dict)
    outputs: str = "equal"

    def __post_init__(self) -> None:
        require_choice("outputs", self.outputs, OUTPUTS)
        for name in ("title", "model", "random_weights"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("random_weights", None):
                raise TypeError(f"{name} must be a string, got {value!r}")
        for name in ("engine", "vary"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} must be a mapping of settings, got {getattr(self, name)!r}")
        if not self.vary:
            raise ValueError("vary must name a setting with its values, got none")
        known = [entry.name for entry in dataclasses.fields(EngineConfig)]
        for name in (*self.engine, *self.vary):
            if name not in known:
                raise unknown_keyword(name, known)
        for name, values in self.vary.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"vary.{name} must be a list of values, got {values!r}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Ablation:
        """Reads the fields of a file.

        Raises:
          TypeError, ValueError: a field is unknown, missing or wrong.
        """
        _require_known(fields, cls)
        given = dict(fields)
        workload = given.pop("workload", {})
        _require_known(workload, Workload)
        if "title" not in given or "vary" not in given:
            raise ValueError("an ablation's file needs a title and what to vary")
        return cls(workload=Workload(**workload), **given)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """All combinations of the varied settings, the baseline first."""
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]


def _require_known(fields: Any, kind: Any) -> None:
    known = [entry.name for entry in dataclasses.fields(kind)]
    if not isinstance(fields, Mapping):
        raise TypeError(f"expected a mapping with {', '.join(known)}, got {fields!r}")
    for name in fields:
        if name not in known:
            raise unknown_keyword(name, known)


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRun:
    """What one combination of settings has given.

    Args:
      setting: the varied settings.
      tokens_per_s: output tokens per second of each timed run.
      num_steps, num_preemptions: of one run.
      prefix_cache_hits: prompt tokens of that run that came from the prefix cache.
      draft_acceptance_rate: share of the drafts that were right; None without any.
      weight_mib, kv_mib: on all devices together.
      equal_tokens: share of output tokens that are the baseline's, up to each request's first difference.
      largest_distance: between the log-probabilities of these tokens and the baseline's.
    """

    setting: dict[str, Any]
    tokens_per_s: tuple[float, ...]
    num_steps: int
    num_preemptions: int
    prefix_cache_hits: int
    draft_acceptance_rate: float | None
    weight_mib: float
    kv_mib: float
    equal_tokens: float
    largest_distance: float

    @property
    def rate(self) -> float:
        """The median of tokens_per_s."""
        return statistics.median(self.tokens_per_s)

    @property
    def name(self) -> str:
        """The setting in words."""
        return _named(self.setting)


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationResult:
    """All runs of an ablation, the baseline first."""

    title: str
    outputs: str
    runs: tuple[AblationRun, ...]

    @property
    def is_ok(self) -> bool:
        """Whether outputs that must be equal are."""
        return self.outputs != "equal" or all(run.equal_tokens == 1 for run in self.runs)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Tokens and log-probabilities of each request."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]


def measure(ablation: Ablation, *, repeats: int, directory: Path = Path()) -> AblationResult:
    """Runs an ablation.

    Args:
      ablation: what to run.
      repeats: timed runs of each setting, after one that is not timed and whose outputs are compared.
      directory: to which random_weights is relative.

    Raises:
      TypeError, ValueError: EngineConfig refuses the settings of a run, whichever it is; the message names them, and
        nothing was measured.
    """
    random_weights = None if ablation.random_weights is None else directory / ablation.random_weights
    target = Target(model=ablation.model, random_weights=random_weights, seed=ablation.workload.seed)
    model_config = parse_model_config(target.fields())
    trace = _trace(ablation.workload)
    configs = [_config(ablation, setting, trace, model_config) for setting in ablation.settings]
    runs: list[AblationRun] = []
    baseline: _Outputs | None = None
    for setting, config in zip(ablation.settings, configs, strict=True):
        with Session(model_config, target.store(model_config), config) as session:
            outputs, run = _run(ablation.workload, trace, session, setting, repeats, baseline)
        baseline = baseline or outputs
        runs.append(run)
    return AblationResult(title=ablation.title, outputs=ablation.outputs, runs=tuple(runs))


def _trace(work: Workload) -> list[TraceEntry]:
    return draw_trace(
        work.num_requests,
        distribution="uniform",
        prompt_len=work.prompt_len,
        output_len=work.output_len,
        spread=work.spread,
        seed=work.seed,
    )


def _config(
    ablation: Ablation, setting: Mapping[str, Any], trace: Sequence[TraceEntry], model_config: ModelConfig
) -> EngineConfig:
    longest = max(entry.prompt_len + entry.output_len for entry in trace)
    try:
        return engine_config(
            {**ablation.engine, **setting}, model_config, num_seqs=min(len(trace), 64), num_tokens=longest
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"setting {_named(setting)}: {error}") from error


def _named(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _run(
    work: Workload,
    trace: Sequence[TraceEntry],
    session: Session,
    setting: Mapping[str, Any],
    repeats: int,
    baseline: _Outputs | None,
) -> tuple[_Outputs, AblationRun]:
    def serve(number: int) -> _Outputs:
        prompts = random_prompts(
            [entry.prompt_len for entry in trace],
            vocab_size=session.model_config.vocab_size,
            seed=(work.seed, number),
            prefix_len=work.prefix_len,
        )
        requests = [
            Request(
                request_id=str(index),
                prompt_token_ids=prompt,
                max_tokens=entry.output_len,
                temperature=work.temperature,
                seed=index,
                logprobs=0,
            )
            for index, (prompt, entry) in enumerate(zip(prompts, trace, strict=True))
        ]
        return _serve(session, requests)

    outputs = serve(0)
    stats = session.engine.stats()
    rates: list[float] = []
    for number in range(1, MAX_RUNS * repeats):
        before, started = session.engine.stats().num_compilations, time.perf_counter()
        timed = serve(number)
        seconds = time.perf_counter() - started
        if session.engine.stats().num_compilations == before:  # else it is no measure of speed
            rates.append(sum(map(len, timed.token_ids)) / seconds)
        if len(rates) == repeats:
            break
    if not rates:
        raise ValueError(f"every run of {setting} had to compile something; raise repeats")
    decoder = session.decoder
    share, distance = _distance(outputs, baseline or outputs)
    return outputs, AblationRun(
        setting=dict(setting),
        tokens_per_s=tuple(rates),
        num_steps=stats.num_steps,
        num_preemptions=stats.num_preemptions,
        prefix_cache_hits=stats.prefix_cache_hits,
        draft_acceptance_rate=stats.draft_acceptance_rate if stats.draft_tokens else None,
        weight_mib=decoder.weight_bytes / _MIB,
        kv_mib=decoder.kv_bytes / _MIB,
        equal_tokens=share,
        largest_distance=distance,
    )


def _serve(session: Session, requests: Sequence[Request]) -> _Outputs:
    for request in requests:
        session.engine.add_request(request)
    outputs = _Outputs([[] for _ in requests], [[] for _ in requests])
    while session.engine.has_unfinished():
        for event in session.engine.step():
            number = int(event.request_id)
            outputs.token_ids[number].append(event.token_id)
            if event.logprobs is not None:
                outputs.logprobs[number].append(event.logprobs.logprob)
    return outputs


def _distance(found: _Outputs, baseline: _Outputs) -> tuple[float, float]:
    """The share of tokens that are equal up to each first difference, and the largest distance of log-probabilities."""
    equal, distances = 0, [0.0]
    for number, (ours, theirs) in enumerate(zip(found.token_ids, baseline.token_ids, strict=True)):
        pairs = zip(ours, theirs, strict=True)
        count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        equal += count
        mine, others = (np.array(outputs.logprobs[number][:count]) for outputs in (found, baseline))
        distances.append(float(np.abs(mine - others).max(initial=0.0)))
    return equal / sum(map(len, baseline.token_ids)), max(distances)


def render(result: AblationResult) -> str:
    """Text with a row for each setting."""
    base = result.runs[0]
    columns = ["setting", "tokens/s", "ratio", "steps", "cached", "preempted", "drafts right", "KV MiB", "weights MiB"]
    rows = [
        [
            run.name,
            run.rate,
            run.rate / base.rate,
            run.num_steps,
            run.prefix_cache_hits,
            run.num_preemptions,
            "-" if run.draft_acceptance_rate is None else f"{run.draft_acceptance_rate:.2f}",
            run.kv_mib,
            run.weight_mib,
            f"{run.equal_tokens:.3f}",
            f"{run.largest_distance:.1e}",
        ]
        for run in result.runs
    ]
    table = format_table([*columns, "equal tokens", "largest distance"], rows)
    verdict = "the first setting is what the others are compared with"
    if result.outputs == "equal":
        differing = [run.name for run in result.runs if run.equal_tokens < 1]
        verdict = (
            f"outputs differ where they must not: {'; '.join(differing)}" if differing else "all outputs are equal"
        )
    return f"{result.title}\n\n{table}\n\n{verdict}"


def draw(result: AblationResult, axes: Any) -> None:
    """Plots the throughput of each setting relative to the first."""
    base = result.runs[0].rate
    names = [run.name.replace(", ", "\n") for run in result.runs]
    ratios = [run.rate / base for run in result.runs]
    errors = [[(run.rate - min(run.tokens_per_s)) / base for run in result.runs]]
    errors.append([(max(run.tokens_per_s) - run.rate) / base for run in result.runs])
    bars = axes.barh(names, ratios, xerr=errors, capsize=3)
    axes.bar_label(bars, [f"{run.rate:.0f} tokens/s, {run.equal_tokens:.0%} equal" for run in result.runs], padding=8)
    axes.invert_yaxis()
    axes.set(xlabel="throughput relative to the first", title=result.title, xlim=(0, 1.6 * max(ratios)))
