"""`bench startup`: what passes before the first token, part by part, in fresh processes.

Owns: the process that is measured (probe) and the one that starts it with an empty, then a full compilation cache.
Does not know: the engine's insides.
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
import jaxinfer
imported = time.perf_counter()
from jaxinfer.bench.startup import probe
probe(imported - started)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartupTimes:
    """Seconds of each part of a process's start, in their order.

    Args:
      interpreter_s: Python itself, and what the measurement imports besides jaxinfer.
      import_s: `import jaxinfer`.
      device_s: JAX finds its devices.
      load_s: weights onto the device, KV pages allocated.
      compile_s: what the first request took longer than a second one of the same shape: tracing, compiling or
        reading from the cache.
      first_token_s: the second request, prefill and first token.
      total_s: from the start of the process to its first token.
      warmup_s: compiling every further program; None where it was not asked for.
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
    """Medians over `repeats` pairs of processes: with an empty compilation cache, then with the one they filled."""

    cold: StartupTimes
    warm: StartupTimes
    repeats: int


def measure(
    target: Target, fields: Mapping[str, Any], *, prompt_len: int, repeats: int, warmup: bool = False
) -> StartupResult:
    """Starts processes and times them.

    Args:
      target: the model.
      fields: of EngineConfig, as given.
      prompt_len: tokens of the first request.
      repeats: pairs of processes.
      warmup: also compile every program.

    Raises:
      ValueError: a process failed; the message is its last line.
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
      import_s: seconds that `import jaxinfer` took.
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
    """The parts, one a line, with an empty and with a full cache."""
    rows = [
        [field.name.removesuffix("_s").replace("_", " "), getattr(result.cold, field.name), warm]
        for field in dataclasses.fields(StartupTimes)
        if (warm := getattr(result.warm, field.name)) is not None
    ]
    return (
        format_table(["seconds", "empty cache", "full cache"], rows)
        + f"\nmedians of {result.repeats} processes each; total is from the start of the process to its first token"
    )
