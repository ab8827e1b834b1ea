"""`bench profile`: where the time of a decode step goes.

Each part of a step is timed alone, in turns with whole steps of the engine: the matrix products of the layers, the
head, attention, the writes to the KV cache, the sampler. What a step takes beyond their sum is "rest": norms,
rotations, activations, sums, and what the host adds where it does not work beside the device.

Owns: the timing, the ratio of a step to its matrix products.
Does not know: what the parts compute (step_parts.py does).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.bench.report import format_table
from jaxinfer.bench.session import Session
from jaxinfer.bench.step_parts import Part, StepParts
from jaxinfer.bench.timed_engine import Decoding
from jaxinfer.engine.step_log import StepLog

_FLOOR = ("products", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRow:
    """A decode step and its parts; all times are medians over the turns.

    Args:
      batch_size: rows of the step.
      context: KV positions that a row reads, mean over the timed steps.
      step_ms: one step of the engine.
      parts: milliseconds of each part, run alone.
      host_ms: what the host does in a step beside waiting for it: scheduling, the batch, launching, reading tokens. It
        runs beside the device, so it is no part of the sum.
    """

    batch_size: int
    context: float
    step_ms: float
    parts: dict[str, float]
    host_ms: float

    @property
    def rest_ms(self) -> float:
        """What a step takes beyond its parts."""
        return self.step_ms - sum(self.parts.values())

    @property
    def floor_ms(self) -> float:
        """The matrix products alone, the head's included."""
        return sum(self.parts[name] for name in _FLOOR)

    @property
    def ratio(self) -> float:
        """A step's time over that of its matrix products alone; 1 could not be better."""
        return self.step_ms / self.floor_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileResult:
    """The steps of all batch sizes in `dtype`, medians of `repeats` turns."""

    rows: tuple[ProfileRow, ...]
    dtype: str
    repeats: int


def measure(
    session: Session, batch_sizes: Sequence[int], *, context: int, num_steps: int, repeats: int, seed: int = 0
) -> ProfileResult:
    """Times decode steps and their parts.

    Args:
      session: the engine, with slots and context for the largest batch.
      batch_sizes: numbers of rows of a step.
      context: KV positions of a row in the middle of the timed steps.
      num_steps: steps of one turn; every part runs as often.
      repeats: turns, after one for warm-up.
      seed: of the prompts.

    Raises:
      ValueError: the context is too short for the steps, or as StepParts and Session.decoding.
    """
    all_steps = (num_steps + 1) * (repeats + 2)
    if context <= all_steps // 2:
        raise ValueError(f"context must be above half of the {all_steps} steps of all turns, got {context}")
    turns = _Turns(context=context, num_steps=num_steps, repeats=repeats, seed=seed)
    parts = StepParts(session)  # refuses models and meshes that it does not know
    session.compile_for(lambda session: [turns.run(session, size, ()) for size in batch_sizes])
    bar = tqdm(batch_sizes, desc="profile", unit="batch", disable=None, leave=False)
    rows = tuple(turns.run(session, size, tuple(parts.parts(size, context))) for size in bar)
    return ProfileResult(rows=rows, dtype=session.decoder.layout.dtype.name, repeats=repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turns:
    """The arguments of measure."""

    context: int
    num_steps: int
    repeats: int
    seed: int

    def run(self, session: Session, batch_size: int, parts: Sequence[Part]) -> ProfileRow:
        """Times the steps of one batch size, and the parts in turns with them."""
        num_steps = (self.num_steps + 1) * (self.repeats + 2)
        prompt_len = max(1, self.context - num_steps // 2)
        steps: list[float] = []
        found: dict[str, list[float]] = {part.name: [] for part in parts}
        with session.decoding(session.prompts(batch_size, prompt_len, self.seed, batch_size)) as decoding:
            decoding.run(self.num_steps)
            first = decoding.mean_len
            for _ in range(self.repeats):
                decoding.run(1)  # the step that it reads was launched ahead of the parts, and has long ended
                steps.append(1e3 * decoding.run(self.num_steps))
                for part in parts:
                    found[part.name].append(1e3 * self._seconds(part))
            context = (first + decoding.mean_len - 1) / 2  # the first timed step reads `first` positions
            host_ms = 1e3 * self._host_seconds(session, decoding)
        return ProfileRow(
            batch_size=batch_size,
            context=context,
            step_ms=statistics.median(steps),
            parts={name: statistics.median(times) for name, times in found.items()},
            host_ms=host_ms,
        )

    def _seconds(self, part: Part) -> float:
        part.run()  # not timed: it waits for the step that the engine has launched ahead
        started = time.perf_counter()
        for _ in range(self.num_steps):
            part.run()
        return (time.perf_counter() - started) / self.num_steps

    def _host_seconds(self, session: Session, decoding: Decoding) -> float:
        """The time of a step in which the engine does not wait for the device."""
        session.engine.log = log = StepLog()
        decoding.run(1)  # so that every step that is read below is in the log
        began = time.perf_counter() - log.origin
        elapsed_s = self.num_steps * decoding.run(self.num_steps)
        session.engine.log = None
        waited_s = sum(step.read - step.waiting for step in log.records if step.waiting > began)
        return (elapsed_s - waited_s) / self.num_steps


def render(result: ProfileResult) -> str:
    """A table with a column for each batch size: milliseconds of the step and its parts, and their shares."""
    rows = result.rows
    names = [*rows[0].parts, "rest"]
    cells: list[list[Any]] = []
    for name in names:
        times = [row.rest_ms if name == "rest" else row.parts[name] for row in rows]
        shares = [f"{100 * ms / row.step_ms:.0f}%" for ms, row in zip(times, rows, strict=True)]
        cells.append([name, *(cell for pair in zip(times, shares, strict=True) for cell in pair)])
    cells.append(["step", *(cell for row in rows for cell in (row.step_ms, "100%"))])
    cells.append(["over its products", *(cell for row in rows for cell in (f"{row.ratio:.2f}", ""))])
    cells.append(["host, beside it", *(cell for row in rows for cell in (row.host_ms, ""))])
    header = ["ms of a decode step", *(cell for row in rows for cell in (f"batch {row.batch_size}", ""))]
    return "\n".join(
        [
            format_table(header, cells),
            f"{result.dtype}, context {rows[0].context:.0f}; each part alone, in turns with whole steps of the engine, "
            f"medians of {result.repeats}",
            "over its products: the step's time over that of its matrix products alone, the head's included",
        ]
    )


def draw(result: ProfileResult, axes: Any) -> None:
    """Plots a bar for each batch size, made of the step's parts, with a line where its matrix products alone end."""
    places = range(len(result.rows))
    bottom = [0.0] * len(result.rows)
    for name in [*result.rows[0].parts, "rest"]:
        times = [max(0.0, row.rest_ms) if name == "rest" else row.parts[name] for row in result.rows]
        shares = [100 * ms / row.step_ms for ms, row in zip(times, result.rows, strict=True)]
        axes.bar(places, shares, bottom=bottom, label=name, width=0.6)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.axhline(100, color="black", linestyle="--", linewidth=1, label="the step")
    axes.set_xticks(places, [f"{row.batch_size}\n{row.step_ms:.3g} ms" for row in result.rows])
    context = f"{result.rows[0].context:.0f}"
    axes.set(
        xlabel="batch size (requests), and its step",
        ylabel="% of the step",
        title=f"Decode step, {result.dtype}, context {context}",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
