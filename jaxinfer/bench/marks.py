"""The most important figures of a `bench gpu` run (marks), each with its goals.

Owns: which figures these are, where they are found in the sections' records, and two goals for each on one H100.
Does not know: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.bench.report import format_table

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One figure and its goals.

    Args:
      name: the figure's name, with its unit.
      section: name of the section whose record holds the figure.
      find: reads the figure from the result in that record; returns None where it is not there.
      first_goal: what the figure has to reach first, as text.
      final_goal: what it has to reach in the end, as text.
      form: format string for the figure.
    """

    name: str
    section: str
    find: Callable[[Record], float | None]
    first_goal: str
    final_goal: str
    form: str = "{:.0f}"

    def seen(self, records: Mapping[str, Record]) -> str:
        """The figure as text, from a run's records by section; a dash where the section or the figure is missing."""
        record = records.get(self.section)
        value = None if record is None else self.find(record["result"])
        return "-" if value is None else self.form.format(value)


def _row(result: Record, kind: str, batch_size: int) -> Record | None:
    rows = (row for row in result["rows"] if row["kind"] == kind and row["batch_size"] == batch_size)
    return next(rows, None)


def _of_floor(kind: str, batch_size: int) -> Callable[[Record], float | None]:
    def find(result: Record) -> float | None:
        row = _row(result, kind, batch_size)
        return None if row is None else 100 * row["floor_ms"] / row["ms"]

    return find


def _host_share(batch_size: int) -> Callable[[Record], float | None]:
    def find(result: Record) -> float | None:
        row = _row(result, "decode", batch_size)
        return None if row is None or row["host_share"] is None else 100 * row["host_share"]

    return find


def _peer_ratio(result: Record) -> float | None:
    (row,) = result["rows"]
    return None if row["peer"] is None else row["peer"]["seconds"] / row["ours"]["seconds"]


def _share_right(result: Record) -> float:
    rows = [row for row in result["rows"] if row["ms"] is None]
    return sum(is_right(row) for row in rows) / max(1, len(rows)) * 100


def is_right(row: Record) -> bool:
    """Whether a row in the record of `bench kernels` ran and, where it was compared, is within its tolerance."""
    return not row["failure"] and not row["max_error"] > row["tolerance"]


def _decode_marks(section: str, goals: Mapping[int, tuple[str, str]]) -> list[Mark]:
    return [
        Mark(
            name=f"{section} decode B={size}, % of floor",
            section=section,
            find=_of_floor("decode", size),
            first_goal=first_goal,
            final_goal=final_goal,
        )
        for size, (first_goal, final_goal) in goals.items()
    ]


def _ratio_mark(name: str, section: str, first_goal: str, final_goal: str) -> Mark:
    return Mark(
        name=name, section=section, find=_peer_ratio, form="{:.1f}", first_goal=first_goal, final_goal=final_goal
    )


MARKS: tuple[Mark, ...] = (
    Mark(name="kernels right, %", section="kernels", find=_share_right, first_goal="100", final_goal="100"),
    *_decode_marks("8b", {1: ("75", "90"), 32: ("70", "88"), 128: ("65", "85")}),
    Mark(
        name="8b prefill of 8192, % of floor",
        section="8b",
        find=_of_floor("prefill", 1),
        first_goal="60",
        final_goal="75",
    ),
    *_decode_marks("0.6b", {1: ("45", "65")}),
    _ratio_mark("0.6b trace, times transformers' continuous batching", "trace-0.6b", "4", "8"),
    _ratio_mark("8b trace, times transformers' continuous batching", "trace-8b", "4", "8"),
    _ratio_mark("0.6b B=1, times transformers' static cache", "peer-0.6b", "1.3", "2"),
    _ratio_mark("8b B=1, times transformers' static cache", "peer-8b", "1.3", "2"),
    Mark(
        name="8b decode B=32, host time exposed, %", section="8b", find=_host_share(32), first_goal="5", final_goal="1"
    ),
    Mark(
        name="0.6b decode B=1, host time exposed, %",
        section="0.6b",
        find=_host_share(1),
        first_goal="5",
        final_goal="1",
    ),
    Mark(
        name="8b first token, programs cached, s",
        section="startup-8b",
        find=lambda result: result["warm"]["total_s"],
        first_goal="60",
        final_goal="20",
    ),
    Mark(
        name="8b first token, cold, s",
        section="startup-8b",
        find=lambda result: result["cold"]["total_s"],
        first_goal="240",
        final_goal="120",
    ),
    Mark(
        name="golden right, % of cases",
        section="golden",
        find=lambda result: 100 * sum(case["is_right"] for case in result["cases"]) / max(1, len(result["cases"])),
        first_goal="100",
        final_goal="100",
    ),
)


def render(records: Mapping[str, Record], marks: Sequence[Mark] = MARKS) -> str:
    """The marks, one per line: the figure of this run and both goals.

    Args:
      records: the sections' records, by section name; those of failed sections may be missing.
      marks: the marks to show.
    """
    rows = [[mark.name, mark.seen(records), mark.first_goal, mark.final_goal] for mark in marks]
    return format_table(["mark", "seen", "first goal", "final goal"], rows)


def headline(record: Record) -> str:
    """The main figures of a section, as one line for the summary."""
    result, command = record["result"], record["command"]
    return _HEADLINES[command](result) if command in _HEADLINES else ""


def _kernels(result: Record) -> str:
    rows = [row for row in result["rows"] if row["ms"] is None]
    timed = [f"{row['backend']} {row['case']} {row['ms']:.2f} ms" for row in result["rows"] if row["ms"] is not None]
    return f"{sum(map(is_right, rows))} of {len(rows)} right; " + ", ".join(timed)


def _roofline(result: Record) -> str:
    rows = [
        f"{row['kind']} B={row['batch_size']} {row['ms']:.2f} ms ({100 * row['floor_ms'] / row['ms']:.0f}%)"
        for row in result["rows"]
    ]
    rates = result["rates"]
    speeds = f"{rates['bytes_per_s'] / 1e9:.0f} GB/s, {rates['ops_per_s'] / 1e12:.0f} TFLOP/s; "
    return speeds + ", ".join(rows)


def _compare(result: Record) -> str:
    """Both sides' times for every row."""
    parts = []
    for row in result["rows"]:
        if row["peer"] is None:
            parts.append(f"ours {row['ours']['seconds']:.2f} s, the peer failed: {row['failure']}")
        else:
            peer, ours = row["peer"]["seconds"], row["ours"]["seconds"]
            more = "" if row["peer"].get("is_whole", True) else "over "
            parts.append(f"peer {more}{peer:.2f} s, ours {ours:.2f} s, ratio {more}{peer / ours:.2f}")
    return "; ".join(parts)


def _golden(result: Record) -> str:
    cases = result["cases"]
    parts = [f"{sum(case['is_right'] for case in cases)} of {len(cases)} cases right"]
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        worst = max(case["max_logprob_error"] for case in cases if case["dtype"] == dtype)
        apart = sum(case["num_diverged"] for case in cases if case["dtype"] == dtype)
        parts.append(f"{dtype} log-probs within {worst:.1e}, {apart} texts part")
    return ", ".join([*parts, f"{len(result['skipped'])} skipped"])


def _startup(result: Record) -> str:
    cold, warm = result["cold"]["total_s"], result["warm"]["total_s"]
    return f"first token after {cold:.1f} s, {warm:.1f} s with a full cache"


_HEADLINES: dict[str, Callable[[Record], str]] = {
    "kernels": _kernels,
    "roofline": _roofline,
    "compare_apart": _compare,
    "golden": _golden,
    "startup": _startup,
}
