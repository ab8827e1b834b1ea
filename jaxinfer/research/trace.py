"""Trace: what the engine did while it was watched, as a table, as pictures and as a file for Perfetto.

Owns: the views of the engine's logs.
Does not know: how steps are logged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.engine.step_log import StepLog, StepRecord
from jaxinfer.research.table import Table

_COLOURS = {"schedule": "C7", "launch": "C1", "read": "C2", "device": "C0"}


class Trace:
    """The steps of an LLM's engines while LLM.trace was active.

    Args:
      logs: one for each replica.
      num_stages: pipeline stages.
    """

    def __init__(self, logs: Sequence[StepLog], *, num_stages: int):
        self.logs = list(logs)
        self.num_stages = num_stages

    @property
    def table(self) -> Table:
        """A row for each launched step: times in seconds, and what it held."""
        rows = []
        for replica, log in enumerate(self.logs):
            for number, step in enumerate(log.records):
                row = {"replica": replica, "step": number, "began": step.began, "launched": step.launched}
                row |= {"read": step.read, "decodes": len(step.decodes), "prefill_chunks": len(step.prefills)}
                row |= {"tokens": step.num_tokens, "live_rows": step.num_live_rows, "rows": step.num_rows}
                row |= {"running": step.num_running, "waiting": step.num_waiting}
                rows.append(row | {"pages_used": step.pages_used, "pages_cached": step.pages_cached})
        return Table(rows, axes=("step",), value="tokens")

    def to_pandas(self) -> Any:
        """The table as a pandas.DataFrame (needs the extra [notebook])."""
        return self.table.to_pandas()

    def plot(self, figure: Any = None, *, replica: int = 0) -> Any:
        """Draws when the host scheduled, launched and read, how full the steps were, and where the pages went.

        Args:
          figure: a matplotlib figure to draw on; None makes one (needs the extra [notebook]).
          replica: whose steps.

        Returns:
          The figure.

        Raises:
          ValueError: nothing was launched while the trace was active.
        """
        import matplotlib.pyplot as pyplot

        steps = self._steps(replica)
        figure = pyplot.figure(figsize=(11, 6), layout="constrained") if figure is None else figure
        lanes, rows, pages = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
        for lane, (name, spans) in enumerate(self._lanes(steps).items()):
            lanes.broken_barh([(begin, end - begin) for begin, end in spans], (-lane - 0.4, 0.8), color=_COLOURS[name])
        lanes.set_yticks(range(0, -len(_COLOURS), -1), list(_COLOURS))
        lanes.set_title(f"{len(steps)} steps, {sum(step.num_tokens for step in steps):,} tokens")
        times = [step.launching for step in steps]
        decodes = [len(step.decodes) for step in steps]
        rows.step(times, [step.num_rows for step in steps], where="post", color="C7", label="rows of the program")
        rows.step(times, [step.num_live_rows for step in steps], where="post", color="C0", label="rows with work")
        rows.step(times, decodes, where="post", color="C1", label="of these, decoding")
        pages.stackplot(
            times,
            [step.pages_used for step in steps],
            [step.pages_cached for step in steps],
            labels=["pages used", "pages cached"],
            colors=["C0", "#bcd2ee"],
            step="post",
        )
        pages.plot(times, [step.num_waiting for step in steps], color="C3", drawstyle="steps-post", label="waiting")
        pages.set_xlabel("seconds")
        for axes in (rows, pages):
            axes.set_ylim(bottom=0)
            axes.legend(fontsize="small", loc="upper right")
        return figure

    def plot_pipeline(self, axes: Any = None, *, replica: int = 0, first: int = 0, count: int = 60) -> Any:
        """Draws the pipeline: a column for each launch, a row for each stage, a bar for the batch that is there.

        A bar's height is the part of its rows that did work; bars of one colour are one batch's way down.

        Args:
          axes: matplotlib axes to draw on; None makes a figure (needs the extra [notebook]).
          replica: whose steps.
          first, count: which launches.

        Returns:
          The axes.

        Raises:
          ValueError: nothing was launched while the trace was active.
        """
        import matplotlib.pyplot as pyplot

        steps, stages = self._steps(replica), self.num_stages
        if axes is None:
            _, axes = pyplot.subplots(figsize=(11, 0.7 * stages + 1.2), layout="constrained")
        for tick in range(first, min(first + count, len(steps))):
            inside = [(stage, steps[tick - stage]) for stage in range(min(stages, tick + 1))]
            size = max(step.num_rows for _, step in inside)
            for stage, step in inside:
                height = 0.9 * step.num_live_rows / max(size, 1)
                axes.bar(tick, height, width=0.9, bottom=-stage, color=f"C{(tick - stage) % max(stages, 2)}")
        axes.set_yticks([-stage + 0.45 for stage in range(stages)], [f"stage {stage}" for stage in range(stages)])
        axes.set_xlabel("launch")
        return axes

    def save(self, file: str | Path) -> None:
        """Writes a file that ui.perfetto.dev and chrome://tracing open: lanes of the host and of the stages, counts."""
        events: list[dict[str, Any]] = []
        for replica, log in enumerate(self.logs):
            names = [*_COLOURS, *(f"stage {stage}" for stage in range(self.num_stages) if self.num_stages > 1)]
            events.append({"ph": "M", "pid": replica, "name": "process_name", "args": {"name": f"replica {replica}"}})
            for lane, name in enumerate(names):
                events.append({"ph": "M", "pid": replica, "tid": lane, "name": "thread_name", "args": {"name": name}})
            for number in range(len(log.records)):
                events += self._events(replica, number, log.records)
        Path(file).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(log.records)} steps" for log in self.logs)
        return f"Trace of {counts}; plot(), plot_pipeline(), save(file), table"

    def _steps(self, replica: int) -> list[StepRecord]:
        if not 0 <= replica < len(self.logs):
            raise ValueError(f"replica must be in 0..{len(self.logs) - 1}, got {replica}")
        steps = self.logs[replica].records
        if not steps:
            raise ValueError("no step was launched while the trace was active; generate inside the with block")
        return steps

    @staticmethod
    def _lanes(steps: Sequence[StepRecord]) -> dict[str, list[tuple[float, float]]]:
        """The spans of each lane, in seconds; the device is taken to be busy from a launch until results are read."""
        return {
            "schedule": [(step.began, step.launching) for step in steps],
            "launch": [(step.launching, step.launched) for step in steps],
            "read": [(step.waiting, step.read) for step in steps if math.isfinite(step.read)],
            "device": [(step.launching, step.read) for step in steps if math.isfinite(step.read)],
        }

    def _events(self, replica: int, number: int, steps: Sequence[StepRecord]) -> list[dict[str, Any]]:
        step = steps[number]
        held = {
            "decodes": list(step.decodes),
            "prefills": [f"{name}: {count} from {start}" for name, start, count in step.prefills],
            "rows": f"{step.num_live_rows} of {step.num_rows}",
        }

        def span(lane: int, name: str, begin: float, end: float) -> dict[str, Any]:
            times = {"ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
            return {"ph": "X", "pid": replica, "tid": lane, "name": name, "args": held, **times}

        found = [
            span(lane, f"step {number}", *spans[0]) for lane, spans in enumerate(self._lanes([step]).values()) if spans
        ]
        if self.num_stages > 1 and number + 1 < len(steps):
            for stage in range(min(self.num_stages, number + 1)):
                name = f"step {number - stage}"
                found.append(span(len(_COLOURS) + stage, name, step.launching, steps[number + 1].launching))
        counts = {
            "pages": {"used": step.pages_used, "cached": step.pages_cached},
            "sequences": {"running": step.num_running, "waiting": step.num_waiting},
            "rows": {"with work": step.num_live_rows, "padding": step.num_rows - step.num_live_rows},
        }
        at = {"ph": "C", "pid": replica, "ts": 1e6 * step.launching}
        return found + [{**at, "name": name, "args": values} for name, values in counts.items()]
