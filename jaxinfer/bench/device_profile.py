"""Profiles what the device does during some steps: the time of each kernel, and how long it waits between kernels.

Owns: recording with jax.profiler and reading the trace that it writes.
Does not know: what is run.
"""

from __future__ import annotations

import gzip
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from jaxinfer.bench.report import Summary, format_table

_SHOWN_KERNELS = 25
_SHOWN_KINDS = 10
_NAME_WIDTH = 72
_GPU_PLANE, _GPU_LINE = "/device:GPU", "Stream"
_CPU_PLANE, _CPU_LINE = "/host:CPU", "tf_XLA"
_DERIVED_LINES = ("XLA", "Steps", "Framework", "Source")
"""Beginnings of the names of lines that the profiler derives from a device's streams: the same time, counted again."""
_CPU_OUTER = "ThunkExecutor"
_NUMBER = re.compile(r"[._]\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """The calls of one kernel.

    Args:
      name: the kernel's name in the trace.
      per_step: calls per step.
      us: microseconds of all these calls per step.
    """

    name: str
    per_step: float
    us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What one device did during some steps.

    Args:
      num_steps: steps recorded.
      is_device: True if the times are a GPU's; False if they are those of the thread pool of XLA's CPU client, which
        are good for a rehearsal only.
      span_ms: time per step, from the start of the first kernel to the end of the last. The profiler slows the host
        down, so this is longer than a step without it.
      busy_ms: time per step during which at least one kernel runs.
      gaps_per_step: pauses between kernels per step.
      gap_us: length of these pauses; None if there are none.
      kernels: the kernels, those with the most time first.
    """

    num_steps: int
    is_device: bool
    span_ms: float
    busy_ms: float
    gaps_per_step: float
    gap_us: Summary | None
    kernels: tuple[KernelTime, ...]

    def idle_share(self, step_ms: float) -> float:
        """The share of a step during which the device waits, at least 0.

        Args:
          step_ms: the time of a step, measured without the profiler.
        """
        return max(0.0, 1 - self.busy_ms / step_ms)


@dataclass(frozen=True, slots=True)
class _Event:
    name: str
    start_ns: float
    end_ns: float


def record(run: Callable[[], object], *, num_steps: int, keep: Path | None = None) -> Profile | None:
    """Runs something under the profiler.

    The device is idle when recording begins and ends, so that exactly the steps launched by `run` are counted. With
    run-ahead it launches as many as it collects: the first that it collects was launched before and has ended by then,
    and the last that it launches is collected later.

    Args:
      run: what to record; all its programs must be compiled already.
      num_steps: steps that it launches.
      keep: file for the trace (XProf's xplane.pb, compressed by gzip); None keeps none.

    Returns:
      What happened on the first device; None if the profiler recorded nothing of it.
    """
    with tempfile.TemporaryDirectory(prefix="jaxinfer-profile-") as folder:
        _wait_for_device()
        with jax.profiler.trace(folder):
            run()
            _wait_for_device()
        file = next(Path(folder).glob("plugins/profile/*/*.xplane.pb"), None)
        if file is None:
            return None
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes(gzip.compress(file.read_bytes(), compresslevel=3))
        return analyse(ProfileData.from_file(str(file)), num_steps=num_steps)


def _wait_for_device() -> None:
    """Runs a new program and waits for it: programs run in the order of their launch, so all others have ended too."""
    jax.block_until_ready(jnp.zeros(8) + 1)


def analyse(data: ProfileData, *, num_steps: int) -> Profile | None:
    """Summarises a trace.

    Args:
      data: the trace.
      num_steps: steps that it covers.

    Returns:
      The profile of the first device that has kernels; None if none has.
    """
    for plane_start, line_start in ((_GPU_PLANE, _GPU_LINE), (_CPU_PLANE, _CPU_LINE)):
        for plane in sorted(data.planes, key=lambda plane: plane.name):
            if plane.name.startswith(plane_start) and (events := list(_events(plane, line_start))):
                return _summed(events, num_steps, is_device=plane_start == _GPU_PLANE)
    return None


def _events(plane: Any, line_start: str) -> Iterator[_Event]:
    lines = [line for line in plane.lines if line.name.startswith(line_start)]
    if not lines and plane.name.startswith(_GPU_PLANE):  # a version of the profiler that names streams otherwise
        lines = [line for line in plane.lines if not line.name.startswith(_DERIVED_LINES)]
    for line in lines:
        for event in line.events:
            if event.duration_ns > 0 and not event.name.startswith(_CPU_OUTER):
                yield _Event(event.name, event.start_ns, event.start_ns + event.duration_ns)


def _summed(events: Sequence[_Event], num_steps: int, *, is_device: bool) -> Profile:
    busy_ns, gaps = _busy_and_gaps(events)
    span_ns = max(event.end_ns for event in events) - min(event.start_ns for event in events)
    return Profile(
        num_steps=num_steps,
        is_device=is_device,
        span_ms=span_ns / 1e6 / num_steps,
        busy_ms=busy_ns / 1e6 / num_steps,
        gaps_per_step=len(gaps) / num_steps,
        gap_us=Summary.of([gap / 1e3 for gap in gaps]) if gaps else None,
        kernels=_by_name([(event.name, 1 / num_steps, event.end_ns - event.start_ns) for event in events], num_steps),
    )


def _by_name(entries: Sequence[tuple[str, float, float]], num_steps: int) -> tuple[KernelTime, ...]:
    """Sums entries of (name, calls per step, nanoseconds of all steps) by name, longest first."""
    calls, total = defaultdict(float), defaultdict(float)
    for name, count, nanoseconds in entries:
        calls[name] += count
        total[name] += nanoseconds
    order = sorted(total, key=total.__getitem__, reverse=True)
    return tuple(KernelTime(name=name, per_step=calls[name], us=total[name] / 1e3 / num_steps) for name in order)


def _busy_and_gaps(events: Sequence[_Event]) -> tuple[float, list[float]]:
    """The nanoseconds during which at least one event is under way, and the lengths of the pauses between."""
    busy, gaps = 0.0, []
    start, end = None, 0.0
    for event in sorted(events, key=lambda event: event.start_ns):
        if start is None:
            start, end = event.start_ns, event.end_ns
        elif event.start_ns > end:
            busy += end - start
            gaps.append(event.start_ns - end)
            start, end = event.start_ns, event.end_ns
        else:
            end = max(end, event.end_ns)
    return busy + (end - start if start is not None else 0.0), gaps


def kinds(profile: Profile) -> tuple[KernelTime, ...]:
    """The kernels with the numbers removed from their names, so that those of all layers are summed.

    Example: loop_fusion_3 and loop_fusion_17 both count as loop_fusion.
    """
    steps = profile.num_steps
    entries = [(_NUMBER.sub("", kernel.name), kernel.per_step, 1e3 * steps * kernel.us) for kernel in profile.kernels]
    return _by_name(entries, steps)


def render(title: str, profile: Profile) -> str:
    """Text of a profile: how busy the device is, then its kernels, by kind and one by one."""
    gaps = profile.gap_us
    waits = f"{profile.gaps_per_step:.0f} pauses a step"
    if gaps is not None:
        waits += f", mean {gaps.mean:.1f} us, p50 {gaps.p50:.1f}, p99 {gaps.p99:.1f}"
    return "\n".join(
        [
            f"{title}: the {'device' if profile.is_device else 'CPU client'} is busy {profile.busy_ms:.3f} ms of "
            f"{profile.span_ms:.3f} ms a step under the profiler ({profile.num_steps} steps); {waits}",
            _table("kind", kinds(profile)[:_SHOWN_KINDS], profile),
            _table("kernel", profile.kernels[:_SHOWN_KERNELS], profile),
        ]
    )


def _table(head: str, kernels: Sequence[KernelTime], profile: Profile) -> str:
    rows = [
        [f"{kernel.per_step:.1f}", f"{kernel.us:.1f}", f"{kernel.us / profile.busy_ms / 10:.1f}%", _short(kernel.name)]
        for kernel in kernels
    ]
    return format_table(["a step", "us a step", "of busy", head], rows)


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 2] + ".."
