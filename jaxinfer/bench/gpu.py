"""`bench gpu`: runs a plan of benchmarks (sections) on a GPU machine within a time budget.

Each section is a process of its own: device memory is free again after it, and a crash or a hang costs that section
only.

Owns: the plan, the processes, the budget, and the results of all sections, which are saved after each one.
Does not know: how a section measures, nor which figures are good (bench/marks.py does).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.bench.marks import headline
from jaxinfer.config.validation import require_choice

_LEAST_SECONDS = 5.0
_SHOWN_ERROR = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One benchmark of the plan.

    Args:
      name: its name, for --sections and the summary.
      arguments: the command line after `jaxinfer bench`.
      memory_bytes: device memory that it needs; it is skipped on smaller devices.
      expected_s: seconds that it takes on an H100, roughly; it is skipped when less than half of that is left.
      limit_s: seconds after which it is stopped.
    """

    name: str
    arguments: tuple[str, ...]
    memory_bytes: float = 0.0
    expected_s: float = 0.0
    limit_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a section ended.

    Args:
      name: the section's.
      status: "ok", "FAILED", "timed out" or "skipped".
      seconds: the time it took.
      note: its main figures if it has a record, else why it has none.
      record: the JSON that it wrote; None if it wrote none.
    """

    name: str
    status: str
    seconds: float
    note: str
    record: dict[str, Any] | None = None


def full_plan(golden: Path, configs: Path) -> list[Section]:
    """The sections for a GPU of the A100 class or larger, the most important first.

    All sections with the same model shape have the same engine settings, so that later ones find the programs of
    earlier ones in the compilation cache.

    Args:
      golden: folder of golden checkpoints.
      configs: folder with bench-8b.json and bench-0.6b.json.
    """
    eight = ("--random-weights", str(configs / "bench-8b.json"))
    small = ("--random-weights", str(configs / "bench-0.6b.json"))
    # Room for 128 rows of 1,152 tokens, or for one prompt of 8,192: 20 GB of KV pages in the 8B shape.
    engine = ("--max-num-seqs", "128", "--max-model-len", "8320", "--max-num-batched-tokens", "8192")
    engine += ("--num-kv-pages", "2432")
    steps = ("--batch-size", "1,32,128", "--context", "1024", "--prefill-len", "8192", "--repeats", "2")
    trace = ("compare", "--apart", "--trace", "256", "--prompt-len", "512", "--output-len", "128", "--repeats", "1")
    single = ("compare", "--apart", "--batch-size", "1", "--prompt-len", "512", "--output-len", "128")
    trace, single = (*trace, "--peer-limit", "90"), (*single, "--peer-limit", "90")
    few = ("--cases", "gqa,gemma2,gemma3,qwen2,gpt2,phi3_long,mixtral,rope_llama3", "--dtype", "float32,bfloat16")
    return [
        Section(name="kernels", arguments=("kernels",), expected_s=35, limit_s=80),
        _large("8b", ("roofline", *eight, *engine, *steps), expected_s=30, limit_s=150),
        Section(name="0.6b", arguments=("roofline", *small, *engine, *steps), expected_s=25, limit_s=90),
        Section(name="peer-0.6b", arguments=(*single, *small, *engine), expected_s=70, limit_s=140),
        Section(name="trace-0.6b", arguments=(*trace, *small, *engine), expected_s=85, limit_s=140),
        _large("startup-8b", ("startup", *eight), expected_s=50, limit_s=100),
        Section(name="golden", arguments=("golden", str(golden), *few), expected_s=30, limit_s=100),
        _large("trace-8b", (*trace, *eight, *engine), expected_s=90, limit_s=160),
        _large("peer-8b", (*single, *eight, *engine), expected_s=80, limit_s=140),
        _large("8b-int8", ("roofline", *eight, *engine, *steps, "--quantization", "int8"), expected_s=40, limit_s=150),
    ]


def _large(name: str, arguments: tuple[str, ...], *, expected_s: float, limit_s: float) -> Section:
    """A section with the 8B shape, which needs 36 GB: 16 GB of weights and the rest for KV pages and activations."""
    return Section(name=name, arguments=arguments, memory_bytes=36e9, expected_s=expected_s, limit_s=limit_s)


def tiny_plan(golden: Path) -> list[Section]:
    """The same kinds of sections with the first golden checkpoint's shape, for a rehearsal on CPU."""
    folder = next(iter(sorted(path.parent for path in golden.glob("*/expected.npz"))), golden)
    shape = ("--random-weights", str(folder))
    lengths = ("--prompt-len", "12", "--output-len", "6", "--repeats", "1")
    rates = ("--read-mib", "16", "--matmul-size", "128")
    steps = ("--batch-size", "1,2", "--context", "32", "--prefill-len", "48", "--num-steps", "4", "--repeats", "1")
    golden_case = ("golden", str(golden), "--cases", folder.name, "--dtype", "float32,bfloat16")
    small = ("--num-cases", "4", "--decode-rows", "2", "--context", "64", "--prompt-len", "32")
    return [
        Section(name="kernels", arguments=("kernels", *small)),
        Section(name="too-large", arguments=("latency",), memory_bytes=1e12),
        Section(name="8b", arguments=("roofline", *shape, *steps, *rates, "--profile")),
        Section(name="peer-0.6b", arguments=("compare", "--apart", "--batch-size", "1", *shape, *lengths)),
        Section(name="trace-0.6b", arguments=("compare", "--apart", "--trace", "6", *shape, *lengths)),
        Section(name="startup-8b", arguments=("startup", *shape, "--prompt-len", "12")),
        Section(name="golden", arguments=golden_case),
    ]


def choose(plan: Sequence[Section], names: Sequence[str]) -> list[Section]:
    """The named sections in the order of the names; all sections if no name is given.

    Raises:
      ValueError: there is no such section.
    """
    by_name = {section.name: section for section in plan}
    for name in names:
        require_choice("sections", name, tuple(by_name))
    return [by_name[name] for name in names] if names else list(plan)


def run(
    plan: Sequence[Section],
    budget_seconds: float,
    show: Callable[[str], None],
    *,
    save: Callable[[Sequence[Outcome]], None] = lambda _: None,
    keep: Path | None = None,
) -> list[Outcome]:
    """Runs the sections one after another.

    Args:
      plan: the sections, the most important first.
      budget_seconds: seconds for all of them together.
      show: called with text to print: a section's title when it begins and its table when it ends.
      save: called after each section with all outcomes so far, so that nothing is lost if this process is stopped.
      keep: folder for each section's table and the profiler's files; None keeps none.
    """
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for section in plan:
        left = budget_seconds - (time.monotonic() - started)
        reason = _reason_to_skip(section, left, outcomes)
        if reason:
            outcome = Outcome(name=section.name, status="skipped", seconds=0.0, note=reason)
        else:
            show(f"\n== {section.name}: {' '.join(section.arguments)}")
            outcome = _run_section(section, min(left, section.limit_s), show, keep)
        outcomes.append(outcome)
        save(outcomes)
    return outcomes


def _reason_to_skip(section: Section, seconds_left: float, outcomes: Sequence[Outcome]) -> str:
    if seconds_left < max(_LEAST_SECONDS, section.expected_s / 2):
        return f"{max(seconds_left, 0):.0f} s of the budget left; raise budget_seconds"
    found = [outcome.record["device"]["memory_bytes"] or 0 for outcome in outcomes if outcome.record]
    if found and section.memory_bytes > found[0]:
        return f"needs {section.memory_bytes / 1e9:.0f} GB of device memory, found {found[0] / 1e9:.0f}"
    return ""


def _run_section(section: Section, limit_s: float, show: Callable[[str], None], keep: Path | None) -> Outcome:
    arguments = section.arguments
    if arguments[0] == "golden":
        arguments = (*arguments, "--budget-seconds", f"{0.7 * limit_s:.0f}")
    if arguments[0] == "roofline" and keep is not None:
        arguments = (*arguments, "--keep", str(keep / section.name))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jaxinfer-bench-") as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "jaxinfer", "bench", *arguments, "--json", str(file)]
        # The section gets a process group of its own, so that stopping it also ends the processes it has started.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            out, err = process.communicate(timeout=limit_s)
            status = "FAILED" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            status = "timed out"
        record = json.loads(file.read_text()) if file.exists() else None
    show(out.rstrip())
    if status != "ok":
        show(err.rstrip()[-_SHOWN_ERROR:])
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{section.name}.txt").write_text(out + ("\n" + err if status != "ok" else ""), encoding="utf-8")
    failure = (err.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    if status == "timed out":
        failure = f"stopped after {limit_s:.0f} s; raise budget_seconds, or name it in --sections"
    return Outcome(
        name=section.name,
        status=status,
        seconds=time.monotonic() - started,
        note=headline(record) if record else failure,
        record=record,
    )


def keep_target_config(keep: Path) -> str:
    """Has XLA write its description of this GPU, with which programs can be compiled for it on other machines.

    XLA dumps the description beside any program that it compiles. That needs a flag which XLA reads when it starts, and
    so a new process.

    Args:
      keep: folder for *.gpu_target_config.pbtxt.

    Returns:
      The file's path, or why there is none.
    """
    program = "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
    with tempfile.TemporaryDirectory(prefix="jaxinfer-dump-") as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120, check=False)
        found = sorted(Path(folder).glob("*.gpu_target_config.pbtxt"))
        if not found:
            return "XLA wrote no gpu_target_config"
        keep.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"^module_\d+\.", "", found[0].name)
        return str(shutil.copy(found[0], keep / name))


def to_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as JSON text."""
    return json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)


def render(outcomes: Sequence[Outcome]) -> str:
    """One line per section."""
    width = max(len(entry.name) for entry in outcomes)
    return "\n".join(
        f"{entry.name:<{width}}  {entry.status:<9}  {entry.seconds:4.0f} s  {entry.note}" for entry in outcomes
    )
