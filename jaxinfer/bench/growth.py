"""`bench growth`: how the time of a decode step grows with the batch, with the context and with the layers.

Each is varied alone, and the growth is set beside that of the least time, which follows from the model's arithmetic and
the device's measured rates (roofline.py).

Owns: the three series, their slopes and their picture.
Does not know: how the engine computes a step.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.bench.report import format_table
from jaxinfer.bench.roofline import DeviceRates, decode_cost, measure_rates, rate_sizes
from jaxinfer.bench.session import Session
from jaxinfer.config.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthSeries:
    """Decode steps of which one size is varied.

    Args:
      name: what is varied: "batch" (rows), "context" (KV positions a row) or "layers".
      sizes: its values, ascending.
      ms: the time of a step with each of them, median over the runs.
      floor_ms: the least time of these steps.
    """

    name: str
    sizes: tuple[int, ...]
    ms: tuple[float, ...]
    floor_ms: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Milliseconds that one more row, position or layer takes: of the straight line that fits best."""
        return _slope(self.sizes, self.ms)

    @property
    def floor_slope(self) -> float:
        """The same of the least time."""
        return _slope(self.sizes, self.floor_ms)


def _slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    return float(np.polyfit(sizes, times, 1)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthResult:
    """The three series; `batch_size`, `context` and `num_layers` are the sizes of those that are not varied."""

    series: tuple[GrowthSeries, ...]
    batch_size: int
    context: int
    num_layers: int
    dtype: str
    repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What to measure.

    Args:
      batch_sizes, contexts, layers: the sizes of each series, two or more.
      batch_size, context: those of the series that do not vary them.
      num_steps: steps of one timed run.
      repeats: timed runs, after one for warm-up.
      seed: of the prompts.

    Raises:
      ValueError: a series has fewer than two sizes, or a context is too short for the steps.
    """

    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    layers: tuple[int, ...]
    batch_size: int
    context: int
    num_steps: int
    repeats: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts", "layers"):
            if len(set(getattr(self, name))) < 2:
                raise ValueError(f"{name} must be two different sizes or more, got {getattr(self, name)}")
        shortest = min(*self.contexts, self.context)
        if shortest <= self.num_timed // 2:
            raise ValueError(f"contexts must be above half of the {self.num_timed} steps of all runs, got {shortest}")

    @property
    def num_timed(self) -> int:
        """Steps of all runs of one point."""
        return self.num_steps * (self.repeats + 1)

    @property
    def most_rows(self) -> int:
        """The largest batch."""
        return max(*self.batch_sizes, self.batch_size)

    @property
    def longest(self) -> int:
        """Positions of the longest row at its end."""
        return max(*self.contexts, self.context) + self.num_timed


def measure(
    growth: Growth, config: ModelConfig, open_session: Callable[[ModelConfig], AbstractContextManager[Session]]
) -> GrowthResult:
    """Measures the device's rates, then the three series.

    Args:
      growth: the sizes.
      config: the model's numbers, with all its layers.
      open_session: opens a session for a model with other layers, with slots and context for the largest sizes.

    Raises:
      ValueError: more layers are asked for than the model has, or the mesh is larger than one device.
    """
    if max(growth.layers) > config.num_layers:
        raise ValueError(f"layers must be <= {config.num_layers}, the model's, got {max(growth.layers)}")
    by_batch = [(size, growth.context) for size in growth.batch_sizes]
    by_context = [(growth.batch_size, context) for context in growth.contexts]
    with open_session(config) as session:
        if session.decoder.mesh.size != 1:
            raise ValueError(f"growth compares with one device, got a mesh of {session.decoder.mesh.size}")
        dtype = session.decoder.layout.dtype
        read_bytes, matmul_size = rate_sizes(session.decoder.mesh.devices.flat[0].platform)
        rates = measure_rates(dtype, read_bytes=read_bytes, matmul_size=matmul_size)
        steps = _steps(growth, session, rates, [*by_batch, *by_context])
    series = [
        _series("batch", growth.batch_sizes, steps[: len(by_batch)]),
        _series("context", growth.contexts, steps[len(by_batch) :]),
    ]
    steps = []
    for num_layers in growth.layers:
        windows = config.windows[:num_layers]
        with open_session(dataclasses.replace(config, num_layers=num_layers, windows=windows)) as session:
            steps += _steps(growth, session, rates, [(growth.batch_size, growth.context)])
    return GrowthResult(
        series=(*series, _series("layers", growth.layers, steps)),
        batch_size=growth.batch_size,
        context=growth.context,
        num_layers=config.num_layers,
        dtype=dtype.name,
        repeats=growth.repeats,
    )


def _steps(
    growth: Growth, session: Session, rates: DeviceRates, points: Sequence[tuple[int, int]]
) -> list[tuple[float, float]]:
    """Milliseconds of a step and its least time, for pairs of batch size and context."""
    session.compile_for(lambda session: [_step_ms(growth, session, *point) for point in points])
    layout = session.decoder.layout
    found = []
    for batch_size, context in points:
        cost = decode_cost(
            session.model_config,
            batch_size=batch_size,
            context=context,
            itemsize=layout.dtype.itemsize,
            weight_itemsize=layout.matrix_dtype.itemsize,
            span=session.config.span,
        )
        found.append((_step_ms(growth, session, batch_size, context), 1e3 * cost.floor_s(rates)))
    return found


def _step_ms(growth: Growth, session: Session, batch_size: int, context: int) -> float:
    prompt_len = context - growth.num_timed // 2
    with session.decoding(session.prompts(batch_size, prompt_len, growth.seed, batch_size, context)) as decoding:
        decoding.run(growth.num_steps)
        return 1e3 * statistics.median(decoding.run(growth.num_steps) for _ in range(growth.repeats))


def _series(name: str, sizes: tuple[int, ...], steps: Sequence[tuple[float, float]]) -> GrowthSeries:
    return GrowthSeries(
        name=name, sizes=sizes, ms=tuple(ms for ms, _ in steps), floor_ms=tuple(floor for _, floor in steps)
    )


def render(result: GrowthResult) -> str:
    """A table with a row for each step, and the slopes of the three series."""
    lines = []
    for series in result.series:
        rows = [
            [size, ms, floor, f"{ms / floor:.2f}"]
            for size, ms, floor in zip(series.sizes, series.ms, series.floor_ms, strict=True)
        ]
        lines += [format_table([series.name, "ms a step", "least ms", "ratio"], rows), _slope_text(series), ""]
    fixed = f"batch {result.batch_size}, context {result.context}, {result.num_layers} layers where not varied"
    return "\n".join([*lines, f"{result.dtype}; {fixed}; medians of {result.repeats} runs after a warm-up"])


def _slope_text(series: GrowthSeries) -> str:
    unit = {"batch": "row", "context": "100 positions", "layers": "layer"}[series.name]
    times = 100 if series.name == "context" else 1
    return f"{times * series.slope:.3g} ms a {unit}; at least {times * series.floor_slope:.3g}"


def draw(result: GrowthResult, axes: Any) -> None:
    """Plots each series in a panel of its own: measured steps, and the least time."""
    figure, place = axes.figure, axes.get_subplotspec()
    axes.remove()
    figure.set_size_inches(12, 4)
    for panel, series in zip(
        place.subgridspec(1, len(result.series)).subplots(sharey=True), result.series, strict=True
    ):
        panel.plot(series.sizes, series.ms, "o-", label="measured")
        panel.plot(series.sizes, series.floor_ms, "--", label="least")
        panel.set(xlabel=series.name, title=_slope_text(series), ylim=(0, None))
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms of a decode step")
    figure.axes[0].legend()
