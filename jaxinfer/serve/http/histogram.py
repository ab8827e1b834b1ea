"""Histogram: how often a number was how large, for numbers that one thread counts.

Owns: the counts, and their form for Prometheus.
Does not know: what is counted.

The histograms of prometheus_client take a lock twice for every number, and look at the buckets one after the other; one
of these is asked for every streamed token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Histogram:
    """Counts numbers; see prometheus_client.Histogram.

    Args:
      name: in the metrics.
      text: what is counted.
      limits: upper ends of the buckets, which belong to them, ascending. What is larger has a bucket of its own.
      labels: by name.
    """

    def __init__(self, name: str, text: str, limits: Sequence[float], labels: dict[str, str]):
        self._name, self._text, self._limits, self._labels = name, text, limits, labels
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def observe(self, number: float) -> None:
        """Counts a number."""
        self._counts[bisect_left(self._limits, number)] += 1
        self._sum += number

    def family(self) -> HistogramMetricFamily:
        """The counts so far; another thread may ask for them."""
        ends = [*map(floatToGoString, self._limits), "+Inf"]
        buckets = [(end, float(count)) for end, count in zip(ends, accumulate(self._counts), strict=True)]
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        return family
