"""The few figures of a `bench gpu` run that decide, beside the first run's and what is aimed at.

Owns: which figures these are, where they stand in the sections' records, the first run's, the aims.
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
    """A figure.

    Args:
      name: with the unit in which `find` gives it.
      section: whose record holds it.
      find: reads it from the record's result; None where it is not there.
      form: of its text.
      first: of the first run on a GPU, as text; empty until there was one.
      aim: as text.
    """

    name: str
    section: str
    find: Callable[[Record], float | None]
    form: str = "{:.0f}"
    first: str = ""
    aim: str = ""

    def seen(self, records: Mapping[str, Record]) -> str:
        """Its text in a run's records by section; a dash where the section or the figure is missing."""
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
    """Whether a row of the kernels' record ran and is within its tolerance."""
    return not row["failure"] and not row["max_error"] > row["tolerance"]


def _decode_marks(section: str, aims: Mapping[int, str]) -> list[Mark]:
    return [
        Mark(name=f"{section} decode B={size}, % of floor", section=section, find=_of_floor("decode", size), aim=aim)
        for size, aim in aims.items()
    ]


MARKS: tuple[Mark, ...] = (
    Mark(name="kernels right, %", section="kernels", find=_share_right, aim="100"),
    *_decode_marks("8b", {1: "85", 32: "75", 128: "70"}),
    Mark(name="8b prefill 8k, % of floor", section="8b", find=_of_floor("prefill", 1), aim="50"),
    Mark(name="8b decode B=32, host %", section="8b", find=_host_share(32), aim="5"),
    *_decode_marks("0.6b", {1: "60", 32: "60", 128: "60"}),
    Mark(name="0.6b decode B=1, host %", section="0.6b", find=_host_share(1), aim="5"),
    Mark(name="0.6b B=1, times the static cache", section="peer-0.6b", find=_peer_ratio, form="{:.2f}", aim="1.2"),
    Mark(name="8b B=1, times the static cache", section="peer-8b", find=_peer_ratio, form="{:.2f}", aim="1.1"),
    Mark(name="0.6b trace, times the peer", section="trace-0.6b", find=_peer_ratio, form="{:.2f}", aim="2"),
    Mark(name="8b trace, times the peer", section="trace-8b", find=_peer_ratio, form="{:.2f}", aim="1.5"),
    Mark(name="8b first token cold, s", section="startup-8b", find=lambda result: result["cold"]["total_s"], aim="40"),
    Mark(name="8b first token warm, s", section="startup-8b", find=lambda result: result["warm"]["total_s"], aim="15"),
    Mark(
        name="golden right, of all",
        section="golden",
        find=lambda result: sum(case["is_right"] for case in result["cases"]) / max(1, len(result["cases"])),
        form="{:.2f}",
        aim="1.00",
    ),
)


def render(records: Mapping[str, Record], marks: Sequence[Mark] = MARKS) -> str:
    """The marks, one a line: seen in this run, in the first one, and aimed at.

    Args:
      records: of the sections that left one, by name.
      marks: which.
    """
    rows = [[mark.name, mark.seen(records), mark.first or "-", mark.aim or "-"] for mark in marks]
    return format_table(["mark", "seen", "first", "aim"], rows)


def headline(record: Record) -> str:
    """The few figures of a section that the summary shows."""
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
    """Both sides' times of every row."""
    parts = []
    for row in result["rows"]:
        if row["peer"] is None:
            parts.append(f"ours {row['ours']['seconds']:.2f} s, the peer failed: {row['failure']}")
        else:
            peer, ours = row["peer"]["seconds"], row["ours"]["seconds"]
            parts.append(f"peer {peer:.2f} s, ours {ours:.2f} s, ratio {peer / ours:.2f}")
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
