"""Metrics: what Prometheus reads of the server.

Owns: which numbers there are, and their names: ours, and beside them those of vLLM, for which there are dashboards.
Does not know: how the engine counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from jaxinfer.api.llm import LLM
from jaxinfer.engine.stats import EngineStats
from jaxinfer.serve.http.histogram import Histogram
from jaxinfer.serve.http.open_requests import OpenRequests

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_OURS, _VLLMS = "jaxinfer_", "vllm:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Number:
    """A number of EngineStats.

    Args:
      name: ours, without the prefix.
      vllms: vLLM's name for it, without the prefix; None if it has none.
      text: what it is.
      is_count: whether it only grows.
    """

    name: str
    vllms: str | None
    text: str
    is_count: bool = True

    def value(self, stats: EngineStats) -> float:
        if self.name == "kv_cache_usage":
            return stats.kv_pages_used / max(stats.kv_pages_total, 1)
        # Prometheus keeps names in _total for what only grows.
        return stats.kv_pages_total if self.name == "kv_pages" else getattr(stats, self.name)


_NUMBERS = (
    _Number("num_requests_running", "num_requests_running", "samples that run", False),
    _Number("num_requests_waiting", "num_requests_waiting", "samples that wait for their turn", False),
    _Number("kv_pages", None, "pages of the KV pool", False),
    _Number("kv_pages_used", None, "pages that samples hold", False),
    _Number("kv_pages_cached", None, "pages that the prefix cache alone holds", False),
    _Number("kv_cache_usage", "kv_cache_usage_perc", "share of the pages that samples hold, 0 .. 1", False),
    _Number("num_requests_finished", None, "samples that have ended"),
    _Number("prefix_cache_queries", "prefix_cache_queries", "prompt tokens looked up in the prefix cache"),
    _Number("prefix_cache_hits", "prefix_cache_hits", "prompt tokens found there"),
    _Number("num_preemptions", "num_preemptions", "samples sent back to the queue"),
    _Number("prompt_tokens", "prompt_tokens", "tokens of prompts"),
    _Number("generation_tokens", "generation_tokens", "tokens generated"),
    _Number("num_steps", None, "steps of the engine"),
    _Number("num_rows_live", None, "rows of steps that had work"),
    _Number("num_rows_launched", None, "rows of steps, padding included"),
    _Number("draft_tokens", "spec_decode_num_draft_tokens", "tokens proposed by speculative decoding"),
    _Number("accepted_draft_tokens", "spec_decode_num_accepted_tokens", "proposed tokens that were right"),
    _Number("num_compilations", None, "programs compiled"),
)
_VLLMS_HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "request_latency_seconds": "e2e_request_latency_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
    "finished_samples": "request_success",
}


class Metrics:
    """The numbers of one server.

    Args:
      llm: the model.
      model_name: a label of all numbers.
      open_requests: the requests that are being answered.
    """

    def __init__(self, llm: LLM, *, model_name: str, open_requests: OpenRequests):
        self._registry = CollectorRegistry()
        self._own = CollectorRegistry()

        histograms: list[Histogram] = []

        def histogram(name: str, text: str, limits: Sequence[float]) -> Histogram:
            histograms.append(Histogram(_OURS + name, text, limits, {"model_name": model_name}))
            return histograms[-1]

        self.first_token = histogram(
            "time_to_first_token_seconds", "from a request's start to its first token", _SECONDS
        )
        self.between_tokens = histogram("inter_token_latency_seconds", "between two outputs of a stream", _SECONDS)
        self.per_token = histogram(
            "time_per_output_token_seconds", "mean time of a request's tokens after the first", _SECONDS
        )
        self.latency = histogram("request_latency_seconds", "from a request's start to its end", _SECONDS)
        self.prompt_tokens = histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self.new_tokens = histogram("request_generation_tokens", "tokens generated for a request", _TOKENS)
        samples = Counter(
            _OURS + "finished_samples", "samples that have ended", ["model_name", "finished_reason"], registry=self._own
        )
        answers = Counter(
            _OURS + "http_answers", "answers by status and route", ["model_name", "route", "status"], registry=self._own
        )
        self._samples, self._answers, self._model_name = samples, answers, model_name
        self._registry.register(_Engine(llm, self._own, histograms, open_requests, model_name=model_name))

    def count_sample(self, finish_reason: str) -> None:
        """Counts a sample that has ended."""
        self._samples.labels(self._model_name, finish_reason).inc()

    def count_answer(self, route: str, status: int) -> None:
        """Counts an answer."""
        self._answers.labels(self._model_name, route, str(status)).inc()

    def text(self) -> bytes:
        """All numbers in Prometheus's text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """Reads the engine's numbers, and gives out all numbers under both names."""

    def __init__(
        self,
        llm: LLM,
        own: CollectorRegistry,
        histograms: Sequence[Histogram],
        open_requests: OpenRequests,
        *,
        model_name: str,
    ):
        self._llm, self._own, self._histograms = llm, own, histograms
        self._open, self._model_name = open_requests, model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.stats()
        for number in _NUMBERS:
            kind = CounterMetricFamily if number.is_count else GaugeMetricFamily
            names = [_OURS + number.name, *([] if number.vllms is None else [_VLLMS + number.vllms])]
            for name in names:
                family = kind(name, number.text, labels=["model_name", "engine"])
                family.add_metric([self._model_name, "0"], number.value(stats))
                yield family
        http = GaugeMetricFamily(_OURS + "http_requests", "requests that are being answered", labels=["model_name"])
        http.add_metric([self._model_name], len(self._open))
        yield http
        slots = GaugeMetricFamily(_OURS + "slots", "samples that can run at the same time", labels=["model_name"])
        slots.add_metric([self._model_name], self._llm.config.max_num_seqs * self._llm.config.data_parallel_size)
        yield slots
        for family in (*self._own.collect(), *(histogram.family() for histogram in self._histograms)):
            yield family
            vllms = _VLLMS_HISTOGRAMS.get(family.name.removeprefix(_OURS))
            if vllms is not None:
                yield _renamed(family, _VLLMS + vllms)


def _renamed(family: Metric, name: str) -> Metric:
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {**sample.labels, "engine": "0"}
        renamed.samples.append(Sample(name + sample.name.removeprefix(family.name), labels, sample.value))
    return renamed
