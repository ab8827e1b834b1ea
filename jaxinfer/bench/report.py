"""How results are shown: as aligned text, as JSON with everything needed to repeat the run, or as a PNG.

Owns: the three formats, and the summary of a sample of times.
Does not know: what was measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

_PACKAGES = ("jaxinfer", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "llama-cpp-python")
_QUIET_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Mean and percentiles of a sample, in the sample's unit.

    Args:
      mean: arithmetic mean.
      p50, p90, p99: percentiles, interpolated linearly between neighbouring values.
    """

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of a sample of at least one value.

        Example:
          >>> Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])
          Summary(mean=3.0, p50=3.0, p90=4.6, p99=4.96)
        """
        p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
        return cls(mean=float(np.mean(values)), p50=p50, p90=p90, p99=p99)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text with columns aligned to the right; floats have three significant digits, or are whole from 1000 on.

    Example:
      >>> print(format_table(["batch", "ms"], [[1, 0.12345], [32, 1234.5]]))
      batch     ms
          1  0.123
         32   1234
    """
    texts = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in texts
    )


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def environment() -> dict[str, Any]:
    """Versions, device, load over the last minute and command line of this process; starts JAX's backend."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "memory_bytes": memory,
        },
        "load_average": os.getloadavg()[0],
        "command_line": sys.argv,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def to_json(command: str, result: Any, settings: dict[str, Any], environment: dict[str, Any]) -> str:
    """A measurement as JSON text.

    Args:
      command: the name of the `bench` command.
      result: its result, a dataclass.
      settings: the settings of the measurement.
      environment: what environment() returned in the process that measured.
    """
    record = {"command": command, **environment, "settings": settings, "result": dataclasses.asdict(result)}
    return json.dumps(record, indent=1, default=str)


def write_json(text: str, file: str) -> None:
    """Writes to a file, or to standard output for "-"."""
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def warn_if_busy() -> None:
    """Warns on standard error if other processes keep the CPU busy, which no median corrects; call before measuring."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > _QUIET_SHARE * cores:
        print(f"warning: load {load:.1f} on {cores} cores before measuring; do not quote the figures", file=sys.stderr)


def require_matplotlib() -> None:
    """Refuses to plot without matplotlib.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("plot needs matplotlib: pip install 'jaxinfer[notebook]'") from error


def save_plot(draw: Callable[[Any], None], file: Path) -> None:
    """Writes a PNG, without touching matplotlib's global state.

    Args:
      draw: called with the Axes to draw on.
      file: the file to write.

    Raises:
      ValueError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=120)


def draw_by_batch(
    axes: Any, sizes: Sequence[int], series: Mapping[str, Sequence[float]], *, value: str, title: str
) -> None:
    """Draws lines over the batch size, with both axes logarithmic and labelled with plain numbers.

    Args:
      axes: the matplotlib Axes to draw on.
      sizes: batch sizes.
      series: for each line, its label and one value per batch size; a line whose label ends in "floor" is dashed.
      value: label of the vertical axis, with the unit.
      title: title above the axes.
    """
    for label, values in series.items():
        axes.plot(sizes, values, "--" if label.endswith("floor") else "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch size (requests)", ylabel=value, title=title)
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)
    plain_numbers(axes)
    axes.legend()


def plain_numbers(axes: Any) -> None:
    """Labels a logarithmic vertical axis with plain numbers."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
