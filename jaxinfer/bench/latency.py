"""`bench latency`: times prefill and decode steps of batches of a fixed size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.bench.report import draw_by_batch, format_table
from jaxinfer.bench.session import Session
from jaxinfer.bench.timed_engine import StepTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyRow:
    """The times at one batch size, medians over the repeats.

    Args:
      batch_size: requests in the batch.
      prompt_len, output_len: tokens of each request.
      prefill_ms: time until every request has its first token.
      decode_ms: time of one decode step of the whole batch.
      prefill_tokens_per_s, decode_tokens_per_s: tokens of all requests together.
      total_ms: prefill and all decode steps.
    """

    batch_size: int
    prompt_len: int
    output_len: int
    prefill_ms: float
    decode_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    total_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyResult:
    """One row per batch size, with medians of `repeats` runs after a warm-up."""

    rows: tuple[LatencyRow, ...]
    repeats: int


def measure(
    session: Session, batch_sizes: Sequence[int], *, prompt_len: int, output_len: int, repeats: int, seed: int = 0
) -> LatencyResult:
    """Times batches of random prompts.

    Args:
      session: the engine, with slots and context for the largest batch.
      batch_sizes: numbers of requests at once.
      prompt_len, output_len: tokens of each request; output_len >= 2.
      repeats: timed runs, after one for warm-up.
      seed: of the prompts.

    Raises:
      ValueError: the engine's settings have no room for a batch, or output_len leaves no decode step to time.
    """
    if output_len < 2:
        raise ValueError(f"output_len must be >= 2, so that there is a decode step to time, got {output_len}")
    rows = []
    for batch_size in tqdm(batch_sizes, desc="latency", unit="batch", disable=None, leave=False):
        times = timed_runs(session, batch_size, prompt_len, output_len - 1, repeats, seed)
        rows.append(_row(times, batch_size, prompt_len, output_len))
    return LatencyResult(rows=tuple(rows), repeats=repeats)


def timed_runs(
    session: Session, batch_size: int, prompt_len: int, num_steps: int, repeats: int, seed: int
) -> list[StepTimes]:
    """The times of `repeats` runs after one for warm-up; every run has prompts of its own."""
    prompts = [session.prompts(batch_size, prompt_len, seed, batch_size, number) for number in range(repeats + 1)]
    session.time_steps(prompts[0], num_steps)
    session.wait_for_programs()
    return [session.time_steps(batch, num_steps) for batch in prompts[1:]]


def _row(times: Sequence[StepTimes], batch_size: int, prompt_len: int, output_len: int) -> LatencyRow:
    prefill_s = statistics.median(entry.prefill_s for entry in times)
    decode_s = statistics.median(entry.decode_s for entry in times)
    return LatencyRow(
        batch_size=batch_size,
        prompt_len=prompt_len,
        output_len=output_len,
        prefill_ms=1e3 * prefill_s,
        decode_ms=1e3 * decode_s,
        prefill_tokens_per_s=batch_size * prompt_len / prefill_s,
        decode_tokens_per_s=batch_size / decode_s,
        total_ms=1e3 * (prefill_s + (output_len - 1) * decode_s),
    )


def render(result: LatencyResult) -> str:
    """A table with one row per batch size."""
    header = ["batch", "prompt", "output", "prefill ms", "prefill tok/s", "decode ms/step", "decode tok/s", "total ms"]
    rows = [
        [
            row.batch_size,
            row.prompt_len,
            row.output_len,
            row.prefill_ms,
            row.prefill_tokens_per_s,
            row.decode_ms,
            row.decode_tokens_per_s,
            row.total_ms,
        ]
        for row in result.rows
    ]
    return format_table(header, rows) + f"\nmedians of {result.repeats} runs after a warm-up, end token ignored"


def draw(result: LatencyResult, axes: Any) -> None:
    """Plots the times of a decode step and of the prefill against the batch size."""
    series = {
        "prefill": [row.prefill_ms for row in result.rows],
        "decode step": [row.decode_ms for row in result.rows],
    }
    draw_by_batch(axes, [row.batch_size for row in result.rows], series, value="ms", title="Latency by batch size")
