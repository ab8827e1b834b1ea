"""`bench throughput`: serves a trace of many requests with one engine, and measures rates and waiting times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.bench.report import Summary, format_table, plain_numbers
from jaxinfer.bench.session import Session
from jaxinfer.bench.workload import TraceEntry, random_prompts
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import Request

_IDLE_SECONDS = 0.001


@dataclass(slots=True)
class _Served:
    """When one request arrived and when each of its tokens was read, in seconds after the start."""

    arrival: float
    tokens: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputResult:
    """The rates and waiting times of a trace that was served.

    Args:
      num_requests, prompt_tokens, output_tokens: totals of the trace.
      duration_s: seconds from the start to the last token.
      requests_per_s, output_tokens_per_s, total_tokens_per_s: means over the duration; total counts prompts too.
      ttft_ms: time to first token, from the request's arrival.
      inter_token_ms: time between neighbouring tokens of a request; None if no request has two.
      end_to_end_ms: time from a request's arrival to its last token.
      num_steps, num_preemptions, num_compilations, prefix_cache_queries, prefix_cache_hits: the engine's counts during
        the run. If num_compilations is not 0, the warm-up missed a shape.
    """

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Summary
    inter_token_ms: Summary | None
    end_to_end_ms: Summary
    num_steps: int
    num_preemptions: int
    num_compilations: int
    prefix_cache_queries: int
    prefix_cache_hits: int


def measure(session: Session, trace: Sequence[TraceEntry], *, prefix_len: int = 0, seed: int = 0) -> ThroughputResult:
    """Serves a trace of random prompts, after a warm-up.

    If all requests arrive at the start, the warm-up serves other prompts of the same lengths, which need the same
    programs. If they arrive over time, it compiles every program, since the clock decides which are needed.

    Args:
      session: the engine, with slots and context for the trace.
      trace: the requests in the order of their arrival.
      prefix_len: leading tokens that all prompts share.
      seed: of the prompts.

    Raises:
      ValueError: the trace has a request that could never run.
    """

    def prompts(number: int) -> list[tuple[int, ...]]:
        lengths = [entry.prompt_len for entry in trace]
        vocab_size = session.model_config.vocab_size
        return random_prompts(lengths, vocab_size=vocab_size, seed=(seed, number), prefix_len=prefix_len)

    if any(entry.arrival_time for entry in trace):
        session.warmup()
    else:
        _serve(session.engine, trace, prompts(0), "warm-up")
    session.wait_for_programs()
    before = session.engine.stats()
    served = _serve(session.engine, trace, prompts(1), "throughput")
    after = session.engine.stats()
    counts = ("num_steps", "num_preemptions", "num_compilations", "prefix_cache_queries", "prefix_cache_hits")
    grown = {name: getattr(after, name) - getattr(before, name) for name in counts}
    return ThroughputResult(**_rates(trace, served), **grown)


def _serve(
    engine: DynamicEngine, trace: Sequence[TraceEntry], prompts: Sequence[tuple[int, ...]], title: str
) -> list[_Served]:
    served = [_Served(entry.arrival_time) for entry in trace]
    coming = sorted(range(len(trace)), key=lambda number: trace[number].arrival_time, reverse=True)
    started = time.perf_counter()
    with tqdm(total=len(trace), desc=title, unit="request", disable=None, leave=False) as bar:
        while coming or engine.has_unfinished():
            now = time.perf_counter() - started
            while coming and trace[coming[-1]].arrival_time <= now:
                number = coming.pop()
                engine.add_request(
                    Request(
                        request_id=str(number),
                        prompt_token_ids=prompts[number],
                        max_tokens=trace[number].output_len,
                    )
                )
            if not engine.has_unfinished():
                time.sleep(_IDLE_SECONDS)
                continue
            for event in engine.step():
                served[int(event.request_id)].tokens.append(time.perf_counter() - started)
                bar.update(event.finish_reason is not None)
    return served


def _rates(trace: Sequence[TraceEntry], served: Sequence[_Served]) -> dict[str, Any]:
    duration = max(entry.tokens[-1] for entry in served)
    prompt_tokens = sum(entry.prompt_len for entry in trace)
    output_tokens = sum(len(entry.tokens) for entry in served)
    gaps = [1e3 * (late - early) for entry in served for early, late in itertools.pairwise(entry.tokens)]
    return {
        "num_requests": len(trace),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "duration_s": duration,
        "requests_per_s": len(trace) / duration,
        "output_tokens_per_s": output_tokens / duration,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / duration,
        "ttft_ms": Summary.of([1e3 * (entry.tokens[0] - entry.arrival) for entry in served]),
        "inter_token_ms": Summary.of(gaps) if gaps else None,
        "end_to_end_ms": Summary.of([1e3 * (entry.tokens[-1] - entry.arrival) for entry in served]),
    }


def _waits(result: ThroughputResult) -> dict[str, Summary]:
    waits = {
        "time to first token": result.ttft_ms,
        "between tokens": result.inter_token_ms,
        "end to end": result.end_to_end_ms,
    }
    return {name: wait for name, wait in waits.items() if wait is not None}


def render(result: ThroughputResult) -> str:
    """Text with the rates, the waiting times and the engine's counts."""
    rows = [[name, wait.mean, wait.p50, wait.p90, wait.p99] for name, wait in _waits(result).items()]
    return "\n".join(
        [
            f"{result.num_requests} requests, {result.prompt_tokens} prompt and {result.output_tokens} output tokens "
            f"in {result.duration_s:.2f} s (end token ignored)",
            f"{result.requests_per_s:.2f} requests/s, {result.output_tokens_per_s:.0f} output tokens/s, "
            f"{result.total_tokens_per_s:.0f} tokens/s in all",
            "",
            format_table(["ms", "mean", "p50", "p90", "p99"], rows),
            "",
            f"{result.num_steps} steps, {result.num_preemptions} preemptions, {result.num_compilations} compilations, "
            f"{result.prefix_cache_hits} of {result.prefix_cache_queries} prompt tokens from the prefix cache",
        ]
    )


def draw(result: ThroughputResult, axes: Any) -> None:
    """Plots the percentiles of the waiting times."""
    waits = _waits(result)
    for name, marker in (("p50", "o"), ("p90", "s"), ("p99", "^")):
        axes.plot(list(waits), [getattr(wait, name) for wait in waits.values()], marker, label=name)
    title = f"{result.num_requests} requests, {result.output_tokens_per_s:.0f} output tokens/s"
    axes.set(yscale="log", ylabel="ms", title=title)
    plain_numbers(axes)
    axes.legend()
