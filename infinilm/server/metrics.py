"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infinilm.engine.stats import EngineStats
from infinilm.outputs import RequestMetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Metrics:
    """What `/metrics` shows: the engine's numbers as they are, and what was seen of requests.

    Times are the engine's: a client that reads slowly does not change them. The inter-token latency of a request is the
    mean gap between its tokens, counted once for every request.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._responses = Counter(
            "infinilm_http_requests", "HTTP requests answered.", ("method", "path", "status"), registry=self._registry
        )
        self._first_token = self._histogram(
            "infinilm_time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self._inter_token = self._histogram(
            "infinilm_inter_token_latency_seconds", "Mean gap between the tokens of a request.", _TOKEN_SECONDS
        )
        self._queued = self._histogram(
            "infinilm_request_queue_seconds", "From a request's arrival to its first step.", _SECONDS
        )
        self._duration = self._histogram(
            "infinilm_request_duration_seconds", "From a request's arrival to its last token.", _SECONDS
        )

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self._registry)

    def count_response(self, method: str, path: str, status: int) -> None:
        """Take note of an answered HTTP request; `path` is the route's, so that clients cannot make up more."""
        self._responses.labels(method, path, str(status)).inc()

    def observe(self, seen: RequestMetrics, num_tokens: int) -> None:
        """Take note of a finished request whose longest answer has `num_tokens` tokens."""
        if seen.first_scheduled_time is not None:
            self._queued.observe(seen.first_scheduled_time - seen.arrival_time)
        if seen.first_token_time is None or seen.finished_time is None:
            return
        self._first_token.observe(seen.first_token_time - seen.arrival_time)
        self._duration.observe(seen.finished_time - seen.arrival_time)
        if num_tokens > 1:
            self._inter_token.observe((seen.finished_time - seen.first_token_time) / (num_tokens - 1))

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's numbers when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        used = stats.num_blocks - stats.num_free_blocks
        gauges = {
            "requests_running": ("Sequences that hold a slot.", stats.num_running),
            "requests_waiting": ("Sequences in the queue.", stats.num_waiting),
            "cache_blocks": ("Blocks of the key-value cache.", stats.num_blocks),
            "cache_blocks_free": ("Blocks that nobody holds, cached ones too.", stats.num_free_blocks),
            "cache_usage_ratio": ("Share of the cache's blocks that somebody holds.", used / max(stats.num_blocks, 1)),
        }
        counters = {
            "preemptions": ("Sequences that gave up their blocks to others.", stats.num_preemptions),
            "prompt_tokens": ("Prompt tokens computed or taken from the prefix cache.", stats.num_prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.num_generation_tokens),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", stats.prefix_cache_hits),
        }
        for name, (documentation, value) in gauges.items():
            yield GaugeMetricFamily(f"infinilm_{name}", documentation, value)
        for name, (documentation, value) in counters.items():
            yield CounterMetricFamily(f"infinilm_{name}", documentation, value)
        finished = CounterMetricFamily("infinilm_answers_finished", "Answers by how they ended.", labels=["reason"])
        for reason, count in stats.num_finished.items():
            finished.add_metric([reason], count)
        yield finished
        version = GaugeMetricFamily("infinilm_weight_version", "1 at the version that answers.", labels=["version"])
        version.add_metric([stats.weight_version], 1)
        yield version
