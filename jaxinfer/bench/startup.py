"""`bench startup`: the time from the start of a process to its first token, part by part.

Owns: the process that is measured (probe), and starting it with an empty, then with a filled compilation cache.
Does not know: how the engine works inside.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxinfer.bench.report import format_table
from jaxinfer.bench.session import Session, Target, engine_config
from jaxinfer.models.registry import parse_model_config

_PROGRAM = """import time
started = time.perf_counter()
from jaxinfer import LLM
imported = time.perf_counter()
from jaxinfer.bench.startup import probe
probe(imported - started)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartupTimes:
    """Seconds of each part of a process's start, in the order in which they happen.

    Args:
      interpreter_s: starting Python, and importing what the measurement needs besides jaxinfer.
      import_s: `from jaxinfer import LLM`.
      device_s: JAX finding its devices.
      load_s: loading weights onto the device and allocating KV pages.
      compile_s: tracing, and compiling or reading programs from the cache: the time of the first request less that of a
        second one with the same shapes.
      first_token_s: the second request, that is, prefill and first token without any compilation.
      total_s: from the start of the process to its first token.
      warmup_s: compiling all further programs; None if that was not asked for.
    """

    interpreter_s: float
    import_s: float
    device_s: float
    load_s: float
    compile_s: float
    first_token_s: float
    total_s: float
    warmup_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StartupResult:
    """Medians over `repeats` pairs of processes: one with an empty compilation cache, one with the cache it filled."""

    cold: StartupTimes
    warm: StartupTimes
    repeats: int


def measure(
    target: Target, fields: Mapping[str, Any], *, prompt_len: int, repeats: int, warmup: bool = False
) -> StartupResult:
    """Starts processes and times them.

    Args:
      target: the model.
      fields: the fields of EngineConfig that the user gave.
      prompt_len: tokens of the first request's prompt.
      repeats: pairs of processes.
      warmup: whether to compile all further programs as well.

    Raises:
      ValueError: a process failed; the message is the last line that it wrote.
    """
    spec = {
        "target": dataclasses.asdict(target),
        "fields": dict(fields),
        "prompt_len": prompt_len,
        "warmup": warmup,
    }
    cold, warm = [], []
    for _ in tqdm(range(repeats), desc="startup", unit="pair", disable=None, leave=False):
        with tempfile.TemporaryDirectory(prefix="jaxinfer-startup-") as cache:
            cold.append(_start(spec, cache))
            warm.append(_start(spec, cache))
    return StartupResult(cold=_median(cold), warm=_median(warm), repeats=repeats)


def _start(spec: dict[str, Any], cache: str) -> StartupTimes:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(spec | {"spawned": time.time()}, default=str),
        env=environment | {"JAXINFER_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the started process ended with {done.returncode}: {last}")
    return StartupTimes(**json.loads(done.stdout.splitlines()[-1]))


def _median(times: list[StartupTimes]) -> StartupTimes:
    names = [field.name for field in dataclasses.fields(StartupTimes) if getattr(times[0], field.name) is not None]
    return StartupTimes(**{name: statistics.median(getattr(entry, name) for entry in times) for name in names})


def probe(import_s: float) -> None:
    """The measured process: reads what to do from standard input, prints its times as one line of JSON.

    Args:
      import_s: seconds that `from jaxinfer import LLM` took.
    """
    spec = json.load(sys.stdin)
    random_weights = spec["target"]["random_weights"]
    target = Target(**spec["target"] | {"random_weights": random_weights and Path(random_weights)})
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    jax.devices()
    device_s = lap()
    model_config = parse_model_config(target.fields())
    config = engine_config(spec["fields"], model_config, num_seqs=64, num_tokens=spec["prompt_len"] + 1)
    with Session(model_config, target.store(model_config), config) as session:
        load_s = lap()
        session.generate(session.prompts(1, spec["prompt_len"], 0), 1)
        first_s, total_s = lap(), time.time() - spec["spawned"]
        session.generate(session.prompts(1, spec["prompt_len"], 1), 1)
        second_s = lap()
        if spec["warmup"]:
            session.warmup()
        warmup_s = lap() if spec["warmup"] else None
    times = StartupTimes(
        interpreter_s=total_s - import_s - device_s - load_s - first_s,
        import_s=import_s,
        device_s=device_s,
        load_s=load_s,
        compile_s=first_s - second_s,
        first_token_s=second_s,
        total_s=total_s,
        warmup_s=warmup_s,
    )
    print(json.dumps(dataclasses.asdict(times)))


def render(result: StartupResult) -> str:
    """A table with one part per row, with an empty and with a filled cache."""
    rows = [
        [field.name.removesuffix("_s").replace("_", " "), getattr(result.cold, field.name), warm]
        for field in dataclasses.fields(StartupTimes)
        if (warm := getattr(result.warm, field.name)) is not None
    ]
    return (
        format_table(["seconds", "empty cache", "full cache"], rows)
        + f"\nmedians of {result.repeats} processes each; total is from the start of the process to its first token"
    )
