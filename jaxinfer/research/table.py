"""Table: results of experiments as rows, shown, plotted and handed on to pandas.

Owns: how a table looks in a notebook and as text, and its plot.
Does not know: what the rows are results of.
"""

from __future__ import annotations

import html
import itertools
import numbers
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN_ROWS = 60
_SHOWN_CHARACTERS = 60


class Table(Sequence[Mapping[str, Any]]):
    """Rows with the same columns, in order.

    Args:
      rows: one mapping of column to value each.
      axes: the columns that were varied, the first of which is the x axis of a plot.
      value: the column that a plot shows.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, axes: Sequence[str] = (), value: str = ""):
        self.rows = list(rows)
        self.axes = tuple(axes)
        self.value = value

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
          KeyError: there is no such column; the message names those there are.
        """
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns)}")
        return [row.get(name) for row in self.rows]

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame (needs the extra [notebook])."""
        import pandas

        return pandas.DataFrame(self.rows, columns=self.columns)

    def means(self, value: str | None = None, *, by: Sequence[str] | None = None) -> dict[tuple[Any, ...], list[float]]:
        """The numbers of a column by the values of others.

        Args:
          value: the column; None takes the table's own.
          by: the columns to group by; None takes the varied ones that have several values.

        Rows in which the value is None are left out.

        Raises:
          KeyError: there is no such column.
          TypeError: the column has something else than numbers.
        """
        name = value or self.value
        by = self._varied() if by is None else by
        keys = zip(*map(self.column, by), strict=True) if by else itertools.repeat(())
        groups: dict[tuple[Any, ...], list[float]] = {}
        for key, entry in zip(keys, self.column(name), strict=False):
            if entry is None:
                continue
            if not isinstance(entry, numbers.Real):
                raise TypeError(f"column {name!r} must have numbers to be plotted, got {_short(entry)!r}")
            groups.setdefault(key, []).append(float(entry))
        return groups

    def plot(self, value: str | None = None, *, x: str | None = None, by: str | None = None, axes: Any = None) -> Any:
        """Plots means with their standard deviation (needs the extra [notebook]).

        Args:
          value: the column to plot; None takes the table's own.
          x: the column of the x axis; None takes the first varied one with several values.
          by: the column with a line or bar each; None takes the second one, if there is one.
          axes: matplotlib axes to draw on; None makes a figure.

        Returns:
          The axes.
        """
        import matplotlib.pyplot as pyplot

        varied = self._varied()
        x = x or (varied[0] if varied else self.columns[0])
        by = by or next((name for name in varied if name != x), None)
        name = value or self.value
        if axes is None:
            _, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        groups = self.means(name, by=[x] if by is None else [x, by])
        labels = list(dict.fromkeys(key[1] for key in groups)) if by is not None else [None]
        places = list(dict.fromkeys(key[0] for key in groups))
        is_line = all(isinstance(place, numbers.Real) and not isinstance(place, bool) for place in places)
        for number, label in enumerate(labels):
            found = [groups.get((place,) if by is None else (place, label), []) for place in places]
            kept = [(index, values) for index, values in enumerate(found) if values]
            means = [statistics.fmean(values) for _, values in kept]
            errors = [statistics.pstdev(values) for _, values in kept]
            text = None if by is None else f"{by} {_short(label)}"
            if is_line:
                axes.errorbar([places[index] for index, _ in kept], means, errors, marker="o", capsize=3, label=text)
            else:
                width = 0.8 / len(labels)
                where = [index - 0.4 + width * (number + 0.5) for index, _ in kept]
                axes.bar(where, means, width, yerr=errors, capsize=3, label=text)
        if not is_line:
            axes.set_xticks(range(len(places)), [_short(place) for place in places], rotation=20, ha="right")
        axes.set(xlabel=x, ylabel=name)
        if by is not None:
            axes.legend(fontsize="small")
        return axes

    def __repr__(self) -> str:
        cells = [self.columns, *([_short(row.get(name)) for name in self.columns] for row in self.rows[:_SHOWN_ROWS])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join(lines + self._more())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_short(row.get(name)))}</td>" for name in self.columns) + "</tr>"
            for row in self.rows[:_SHOWN_ROWS]
        )
        more = "".join(f"<p>{line}</p>" for line in self._more())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _more(self) -> list[str]:
        left = len(self.rows) - _SHOWN_ROWS
        return [f"and {left} more rows"] if left > 0 else []

    def _varied(self) -> list[str]:
        """The varied columns with several values."""
        if not self.rows:
            raise ValueError("the table has no rows")
        return [name for name in self.axes if len({repr(value) for value in self.column(name)}) > 1]


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
