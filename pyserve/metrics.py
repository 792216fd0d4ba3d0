"""What /metrics shows, under vLLM's names, old and new, so that its dashboards work.

Gauges and token counters are read from the engine when somebody asks: nothing is counted twice and
nothing is counted per token. Histograms are observed once per delta a request takes and once per
request; they are plain lists, as prometheus_client's own cost 0.8 us an observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pyserve.client import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
FINISHED_REASONS = ("stop", "length", "abort", "error")
LABELS = ("model_name", "engine")


class Histogram:
    """Counts per bucket and their sum; made cumulative only when shown."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Note `count` observations of `value`."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) of every bucket, ending with "+Inf"."""
        buckets = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            buckets.append((bound, float(seen)))
        return buckets


class Metrics(Collector):
    """All series of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.time_to_first_token_s = Histogram(FIRST_TOKEN_BUCKETS_S)
        self.inter_token_latency_s = Histogram(INTER_TOKEN_BUCKETS_S)
        self.e2e_latency_s = Histogram(REQUEST_BUCKETS_S)
        self.num_finished = dict.fromkeys(FINISHED_REASONS, 0)
        self._labels = (model_name, "0")
        self._stats: Callable[[], EngineStats] | None = None
        self._num_blocks = 1
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def watch(self, stats: Callable[[], EngineStats], num_blocks: int) -> None:
        """Read the engine's figures from here on; without it they are absent."""
        self._stats = stats
        self._num_blocks = num_blocks

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry, also once when it is made."""
        yield from self._requests()
        if self._stats is not None:
            yield from self._engine(self._stats())

    def _requests(self) -> Iterable[Metric]:
        first, inter = self.time_to_first_token_s, self.inter_token_latency_s
        yield self._histogram("time_to_first_token_seconds", "Arrival to first token", first)
        for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
            yield self._histogram(name, "Time from one token to the next", inter)
        yield self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token", self.e2e_latency_s
        )
        finished = CounterMetricFamily(
            "vllm:request_success", "Finished sequences", labels=(*LABELS, "finished_reason")
        )
        for reason, count in self.num_finished.items():
            finished.add_metric((*self._labels, reason), count)
        yield finished

    def _engine(self, stats: EngineStats) -> Iterable[Metric]:
        usage = stats.num_blocks_used / self._num_blocks
        hit_rate = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences that run", stats.num_running),
            ("num_requests_waiting", "Sequences that wait", stats.num_waiting),
            ("kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1", usage),
            ("gpu_cache_usage_perc", "kv_cache_usage_perc under its old name", usage),
            ("gpu_prefix_cache_hit_rate", "Part of the prompt tokens found cached", hit_rate),
        ):
            yield self._gauge(f"vllm:{name}", text, value)
        yield self._gauge(
            "pyserve:device_allocations",
            "Times memory was taken from the GPU: constant after ready",
            stats.num_device_allocations,
        )
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens", stats.prompt_tokens),
            ("generation_tokens", "Output tokens", stats.output_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found cached", stats.cached_tokens),
            ("num_preemptions", "Preemptions", stats.num_preemptions),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self._labels, histogram.cumulative(), histogram.total)
        return family
