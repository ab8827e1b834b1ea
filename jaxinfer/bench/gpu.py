"""`bench gpu`: everything worth knowing about a GPU machine, inside a time budget.

Owns: the plan, one process a section (memory is free again after each, a crash or a hang costs one section only), the
budget and the summary.
Does not know: how a section measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LEAST_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One measurement.

    Args:
      title: for the summary.
      arguments: of `python -m jaxinfer.bench`.
      memory_bytes: of the device that it needs.
      budget_share: of the whole budget it may take at most.
    """

    title: str
    arguments: tuple[str, ...]
    memory_bytes: float = 0.0
    budget_share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a section.

    Args:
      title: the section's.
      status: "ok", "FAILED", "timed out" or "skipped".
      seconds: it took.
      note: why it did not end well, or its headline.
      record: its JSON; None where it wrote none.
    """

    title: str
    status: str
    seconds: float
    note: str
    record: dict[str, Any] | None = None


def full_plan(golden: Path, configs: Path) -> list[Section]:
    """The sections for a GPU of the A100 class or larger, most wanted first.

    Args:
      golden: folder of golden checkpoints.
      configs: folder with bench-8b.json, bench-0.6b.json and bench-135m.json.
    """
    shapes = {name: ("--random-weights", str(configs / f"bench-{name}.json")) for name in ("8b", "0.6b", "135m")}
    eight = 24e9
    wide = ("--max-num-batched-tokens", "8192")
    trace = ("--num-requests", "256", "--prompt-len", "512", "--output-len", "128", "--max-num-seqs", "128")
    return [
        _golden(golden),
        Section(
            title="roofline 8b",
            arguments=("roofline", *shapes["8b"], "--batch-size", "1,32,128", "--context", "1024", *wide),
            memory_bytes=eight,
            budget_share=0.35,
        ),
        Section(
            title="roofline 0.6b",
            arguments=("roofline", *shapes["0.6b"], "--batch-size", "1,32,128", "--context", "1024", *wide),
        ),
        Section(
            title="latency 135m",
            arguments=("latency", *shapes["135m"], "--batch-size", "1,8,32", "--output-len", "128"),
        ),
        Section(title="throughput 0.6b", arguments=("throughput", *shapes["0.6b"], *trace, *wide)),
        Section(title="startup 0.6b", arguments=("startup", *shapes["0.6b"])),
        Section(title="throughput 8b", arguments=("throughput", *shapes["8b"], *trace, *wide), memory_bytes=eight),
    ]


def tiny_plan(golden: Path) -> list[Section]:
    """The same sections with the first golden checkpoint as the model, for a rehearsal on CPU."""
    model = ("--model", str(next(iter(sorted(path.parent for path in golden.glob("*/expected.npz"))), golden)))
    lengths = ("--prompt-len", "12", "--output-len", "6")
    small = ("--read-mib", "16", "--matmul-size", "128", "--repeats", "1", "--num-steps", "4")
    return [
        _golden(golden),
        Section(title="too large", arguments=("latency",), memory_bytes=1e12),
        Section(title="roofline", arguments=("roofline", *model, "--batch-size", "1,2", "--context", "32", *small)),
        Section(title="latency", arguments=("latency", *model, "--batch-size", "1,2", *lengths, "--repeats", "1")),
        Section(title="throughput", arguments=("throughput", *model, "--num-requests", "6", *lengths)),
        Section(title="startup", arguments=("startup", *model, "--prompt-len", "12")),
    ]


def _golden(directory: Path) -> Section:
    return Section(title="golden", arguments=("golden", str(directory)), budget_share=0.35)


def run(plan: Sequence[Section], budget_seconds: float, show: Callable[[str], None]) -> list[Outcome]:
    """Runs the sections one after another.

    Args:
      plan: in the order of importance.
      budget_seconds: for all of them.
      show: is given each section's title and table as it ends.
    """
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for section in plan:
        left = budget_seconds - (time.monotonic() - started)
        reason = _reason_to_skip(section, left, outcomes)
        if reason:
            outcome = Outcome(title=section.title, status="skipped", seconds=0.0, note=reason)
        else:
            show(f"\n== {section.title}: {' '.join(section.arguments)}")
            outcome = _run_section(section, min(left, section.budget_share * budget_seconds), show)
        outcomes.append(outcome)
    return outcomes


def _reason_to_skip(section: Section, seconds_left: float, outcomes: Sequence[Outcome]) -> str:
    if seconds_left < _LEAST_SECONDS:
        return f"{max(seconds_left, 0):.0f} s of the budget left; raise budget_seconds"
    memory = next((outcome.record["device"]["memory_bytes"] for outcome in outcomes if outcome.record), None)
    if section.memory_bytes > (memory or 0):
        return f"needs {section.memory_bytes / 1e9:.0f} GB of device memory, found {(memory or 0) / 1e9:.0f}"
    return ""


def _run_section(section: Section, limit_s: float, show: Callable[[str], None]) -> Outcome:
    arguments = section.arguments
    if arguments[0] == "golden":
        arguments = (*arguments, "--budget-seconds", f"{0.8 * limit_s:.0f}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jaxinfer-bench-") as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "jaxinfer", "bench", *arguments, "--json", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            note = f"stopped after {limit_s:.0f} s; raise budget_seconds"
            return Outcome(title=section.title, status="timed out", seconds=limit_s, note=note)
        record = json.loads(file.read_text()) if file.exists() else None
    show(done.stdout.rstrip())
    if done.returncode:
        show(done.stderr.rstrip())
    failure = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Outcome(
        title=section.title,
        status="FAILED" if done.returncode else "ok",
        seconds=time.monotonic() - started,
        note=_headline(record) if record else failure,
        record=record,
    )


def _headline(record: dict[str, Any]) -> str:
    """The few figures of a section that the summary shows."""
    result, command = record["result"], record["command"]
    if command == "golden":
        worst = max((case["max_logprob_error"] for case in result["cases"]), default=0.0)
        equal = sum(case["tokens_equal"] for case in result["cases"])
        return (
            f"{equal} of {len(result['cases'])} cases with equal tokens, log-probs within {worst:.1e}, "
            f"{len(result['skipped'])} skipped"
        )
    if command == "roofline":
        return f"{result['rates']['bytes_per_s'] / 1e9:.0f} GB/s; decode " + ", ".join(
            f"B={row['batch_size']} {row['decode_ms']:.2f} ms ({100 * row['decode_floor_ms'] / row['decode_ms']:.0f}%)"
            for row in result["rows"]
        )
    if command == "latency":
        return "decode " + ", ".join(
            f"B={row['batch_size']} {row['decode_ms']:.2f} ms ({row['decode_tokens_per_s']:.0f} tok/s)"
            for row in result["rows"]
        )
    if command == "throughput":
        return (
            f"{result['output_tokens_per_s']:.0f} output tok/s, {result['requests_per_s']:.1f} requests/s, "
            f"first token p50 {result['ttft_ms']['p50']:.0f} ms"
        )
    return f"first token after {result['cold']['total_s']:.1f} s, {result['warm']['total_s']:.1f} s with a full cache"


def render(outcomes: Sequence[Outcome]) -> str:
    """One line a section."""
    width = max(len(entry.title) for entry in outcomes)
    return "\n".join(
        f"{entry.title:<{width}}  {entry.status:<9}  {entry.seconds:4.0f} s  {entry.note}" for entry in outcomes
    )
