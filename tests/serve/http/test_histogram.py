"""Histogram against prometheus_client's."""

import random

import prometheus_client
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from jaxinfer.serve.http.histogram import Histogram

LIMITS = (0.001, 0.5, 1, 60, 1048576)


class Given(Collector):
    def __init__(self, family):
        self._family = family

    def collect(self):
        yield self._family


def test_histogram_tells_prometheus_the_same_as_its_clients_own():
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    expected = prometheus_client.Histogram("seconds", "a time", ["model"], buckets=LIMITS, registry=theirs)
    found = Histogram("seconds", "a time", LIMITS, {"model": "m"})
    rng = random.Random(0)
    for number in [*LIMITS, 0.0, 2.0**30, *(10 ** rng.uniform(-4, 7) for _ in range(500))]:
        expected.labels("m").observe(number)
        found.observe(number)
    ours.register(Given(found.family()))
    lines = generate_latest(theirs).decode().splitlines()
    assert [line for line in lines if "_created" not in line] == generate_latest(ours).decode().splitlines()
