"""Metrics: the contents of /metrics, under vLLM's names, old and new, so that its dashboards work.

Metrics that vLLM does not have begin with pyserve:. Gauges and token counters are read from the
engine on each request for /metrics, so nothing is counted twice. The engine observes once per step,
the API once per sequence and once per request; nothing is observed once per token.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pyserve.client import EngineInfo, EngineStats, SequenceStream
from pyserve.histogram import (
    CHOICE_BUCKETS,
    FIRST_TOKEN_BUCKETS_S,
    INTER_TOKEN_BUCKETS_S,
    REQUEST_BUCKETS_S,
    Histogram,
    token_buckets,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISHED_REASONS = ("stop", "length", "abort", "error")
LABELS = ("model_name", "engine")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # indexed by sleep level
MAX_ADAPTERS = 16  # adapter names in one label
DEFAULT_MAX_TOKENS = 2**17  # largest bucket of the token histograms, until an engine is watched


@dataclass(slots=True)
class KeyUsage:
    """Usage of the API keys of one name: requests that have ended, and their tokens."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


class Metrics(Collector):
    """All metrics of one server, in a registry of their own.

    What vLLM's names call a request is a sequence here: each choice of each prompt is one.
    """

    def __init__(self, model_name: str) -> None:
        self.num_finished = dict.fromkeys(FINISHED_REASONS, 0)  # ended sequences by finish reason
        self.num_requests = {"finished": 0, "aborted": 0, "failed": 0}  # submitted requests by end
        self.usage_by_key: dict[str, KeyUsage] = {}
        self.num_responses: Counter[int] = Counter({200: 0, 400: 0, 429: 0, 500: 0, 503: 0})
        self.time_to_first_token_s = Histogram(FIRST_TOKEN_BUCKETS_S)
        self.request_time_per_output_token_s = Histogram(INTER_TOKEN_BUCKETS_S)
        self.e2e_latency_s = Histogram(REQUEST_BUCKETS_S)
        self.queue_time_s = Histogram(REQUEST_BUCKETS_S)
        self.prefill_time_s = Histogram(REQUEST_BUCKETS_S)
        self.decode_time_s = Histogram(REQUEST_BUCKETS_S)
        self.inference_time_s = Histogram(REQUEST_BUCKETS_S)
        self.params_n = Histogram(CHOICE_BUCKETS)
        self._size_token_histograms(DEFAULT_MAX_TOKENS)
        self._labels = (model_name, "0")
        self._stats: Callable[[], EngineStats] | None = None
        self._info: EngineInfo | None = None
        self._loop_lag_s: Callable[[], float] | None = None
        self._responses: Callable[[], tuple[int, int, int]] | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def add(self, collector: Collector) -> None:
        """Add the metrics of `collector`."""
        self._registry.register(collector)

    def watch(self, stats: Callable[[], EngineStats], info: EngineInfo) -> None:
        """Add the engine's metrics, read by `stats`. Until this is called they are absent."""
        self._stats = stats
        self._info = info
        self._size_token_histograms(info.max_model_len)

    def watch_loop(self, lag_s: Callable[[], float]) -> None:
        """Add the lag of the event loop, read by `lag_s` in seconds."""
        self._loop_lag_s = lag_s

    def watch_responses(self, sizes: Callable[[], tuple[int, int, int]]) -> None:
        """Add the sizes of the response store, read by `sizes`.

        It returns the number of stored responses, their bytes, and the number of responses that
        run in the background.
        """
        self._responses = sizes

    def count_usage_of(self, key_names: Iterable[str]) -> None:
        """Count the usage of the API keys of these names, and of no others."""
        self.usage_by_key = {name: KeyUsage() for name in key_names}

    def observe_usage(
        self, key_name: str, *, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Count a request that was submitted and has ended, for the API key's name.

        A prompt counts once, whatever n is, as in the response's `usage`. Nothing is counted for
        names that `count_usage_of` was not given.
        """
        usage = self.usage_by_key.get(key_name)
        if usage is not None:
            usage.num_requests += 1
            usage.num_prompt_tokens += num_prompt_tokens
            usage.num_output_tokens += num_output_tokens

    def observe_sequence(
        self,
        stream: SequenceStream,
        reason: str,
        *,
        num_output_tokens: int,
        max_tokens: int,
        e2e_s: float,
    ) -> None:
        """Record a sequence that has ended by `reason`, one of FINISHED_REASONS.

        e2e_s  seconds from the arrival of its request to its end.
        """
        self.num_finished[reason] += 1
        self.e2e_latency_s.observe(e2e_s)
        self.prompt_tokens.observe(stream.num_prompt_tokens)
        self.generation_tokens.observe(num_output_tokens)
        if stream.pooled is None:  # a pooled sequence generates nothing
            self.params_max_tokens.observe(max_tokens)
        ended_s, scheduled_s = stream.ended_s, stream.scheduled_s
        self.queue_time_s.observe((scheduled_s or ended_s) - stream.queued_s)
        if not scheduled_s:
            return
        self.inference_time_s.observe(ended_s - scheduled_s)
        self.prefill_kv_computed_tokens.observe(stream.num_prompt_tokens - stream.num_cached_tokens)
        if not stream.first_token_s:
            return
        decode_s = ended_s - stream.first_token_s
        self.prefill_time_s.observe(stream.first_token_s - scheduled_s)
        self.decode_time_s.observe(decode_s)
        if num_output_tokens > 1:
            self.request_time_per_output_token_s.observe(decode_s / (num_output_tokens - 1))

    def observe_prompt(self, n: int, max_output_tokens: int) -> None:
        """Record a prompt whose `n` choices have ended.

        max_output_tokens  output tokens of the longest choice.
        """
        self.params_n.observe(n)
        self.max_num_generation_tokens.observe(max_output_tokens)

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics. Called by the registry, also once when this is registered."""
        yield from self._histograms()
        yield from self._requests()
        if self._loop_lag_s is not None:
            yield self._gauge(
                "pyserve:loop_lag_seconds",
                "How late the event loop was at worst, in the last half minute",
                self._loop_lag_s(),
            )
        if self._responses is not None:
            num_stored, num_bytes, num_running = self._responses()
            text = "Responses that clients may come back to"
            yield self._gauge("pyserve:stored_responses", text, num_stored)
            yield self._gauge("pyserve:stored_response_bytes", "Bytes of these", num_bytes)
            text = "Responses that run in the background"
            yield self._gauge("pyserve:background_responses", text, num_running)
        if self._stats is not None and self._info is not None:
            stats = self._stats()
            yield from self._engine_gauges(stats, self._info)
            yield from self._engine_counters(stats)
            yield from self._engine_histograms(stats)
            if self._info.num_adapter_slots:
                yield from self._adapters(stats, self._info)
            yield self._config(self._info)

    def _size_token_histograms(self, max_tokens: int) -> None:
        bounds = token_buckets(max_tokens)
        self.prompt_tokens = Histogram(bounds)
        self.generation_tokens = Histogram(bounds)
        self.max_num_generation_tokens = Histogram(bounds)
        self.params_max_tokens = Histogram(bounds)
        self.prefill_kv_computed_tokens = Histogram(bounds)

    def _histograms(self) -> Iterable[Metric]:
        queue_text = "Arrival in the engine to the first step"
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", self.time_to_first_token_s),
            ("request_time_per_output_token_seconds", "Mean time from one token of a sequence to "
             "the next", self.request_time_per_output_token_s),
            ("e2e_request_latency_seconds", "Arrival to last token", self.e2e_latency_s),
            ("request_queue_time_seconds", queue_text, self.queue_time_s),
            ("time_in_queue_requests", f"{queue_text}, under its old name", self.queue_time_s),
            ("request_prefill_time_seconds", "First step to first token", self.prefill_time_s),
            ("request_decode_time_seconds", "First token to the end", self.decode_time_s),
            ("request_inference_time_seconds", "First step to the end", self.inference_time_s),
            ("request_prompt_tokens", "Prompt tokens", self.prompt_tokens),
            ("request_generation_tokens", "Output tokens", self.generation_tokens),
            ("request_max_num_generation_tokens", "Output tokens of a prompt's longest choice",
             self.max_num_generation_tokens),
            ("request_params_max_tokens", "max_tokens", self.params_max_tokens),
            ("request_params_n", "n", self.params_n),
            ("request_prefill_kv_computed_tokens", "Prompt tokens that were not cached",
             self.prefill_kv_computed_tokens),
        ):  # fmt: skip
            yield self._histogram(f"vllm:{name}", text, histogram)

    def _requests(self) -> Iterable[Metric]:
        yield self._counter(
            "vllm:request_success", "Finished sequences", "finished_reason", self.num_finished
        )
        text = "Requests that were submitted, by their end"
        yield self._counter("pyserve:requests", text, "end", self.num_requests)
        text = "Responses by status; streams count when they begin"
        responses = {str(code): count for code, count in sorted(self.num_responses.items())}
        yield self._counter("pyserve:http_responses", text, "code", responses)

        usage = self.usage_by_key
        for name, text, values in (
            ("requests", "Requests that were submitted and have ended",
             {key_name: one.num_requests for key_name, one in usage.items()}),
            ("prompt_tokens", "Prompt tokens of these requests",
             {key_name: one.num_prompt_tokens for key_name, one in usage.items()}),
            ("generation_tokens", "Output tokens of these requests",
             {key_name: one.num_output_tokens for key_name, one in usage.items()}),
        ):  # fmt: skip
            text = f"{text}, by the name of the API key"
            yield self._counter(f"pyserve:key_{name}", text, "key_name", values)

    def _engine_gauges(self, stats: EngineStats, info: EngineInfo) -> Iterable[Metric]:
        usage = stats.num_blocks_used / info.num_blocks
        hit_rate = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences that run", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait", stats.num_waiting),
            ("vllm:num_requests_swapped", "Always 0: preempted ones are recomputed", 0),
            ("vllm:kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1", usage),
            ("vllm:gpu_cache_usage_perc", "kv_cache_usage_perc under its old name", usage),
            ("vllm:cpu_cache_usage_perc", "Always 0: nothing is swapped to the host", 0),
            ("vllm:gpu_prefix_cache_hit_rate", "Part of the prompt tokens found cached", hit_rate),
            ("pyserve:device_allocations", "Times memory was taken from the GPU: constant after "
             "ready", stats.num_device_allocations),
            ("pyserve:step_age_seconds", "Age of the running step, 0 where none runs",
             stats.step_age_s),
        ):  # fmt: skip
            yield self._gauge(name, text, value)
        state = GaugeMetricFamily(
            "vllm:engine_sleep_state",
            "1 for the state that it is in, 0 for the others",
            labels=(*LABELS, "sleep_state"),
        )
        for level, name in enumerate(SLEEP_STATES):
            state.add_metric((*self._labels, name), level == stats.sleep_level)
        yield state
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait for room, or for the prefill of an equal prompt",
            labels=(*LABELS, "reason"),
        )
        waiting.add_metric((*self._labels, "capacity"), stats.num_waiting - stats.num_awaiting)
        waiting.add_metric((*self._labels, "deferred"), stats.num_awaiting)
        yield waiting

    def _adapters(self, stats: EngineStats, info: EngineInfo) -> Iterable[Metric]:
        names = {
            "max_lora": str(info.num_adapter_slots),
            "waiting_lora_adapters": _joined(stats.waiting_adapters),
            "running_lora_adapters": _joined(stats.running_adapters),
        }
        text = "Adapters of sequences that run and that wait, as labels; the time, in seconds"
        family = GaugeMetricFamily("vllm:lora_requests_info", text, labels=(*LABELS, *names))
        family.add_metric((*self._labels, *names.values()), time.time())
        yield family
        loads = {"host": stats.num_adapter_reads, "device": stats.num_adapter_loads}
        text = "Adapters that were read into the host's memory, and put where steps use them"
        yield self._counter("pyserve:adapter_loads", text, "place", loads)

    def _engine_counters(self, stats: EngineStats) -> Iterable[Metric]:
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens", stats.prompt_tokens),
            ("vllm:prompt_tokens_cached", "Prompt tokens found cached", stats.cached_tokens),
            ("vllm:generation_tokens", "Output tokens", stats.output_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up", stats.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found cached", stats.cached_tokens),
            ("vllm:gpu_prefix_cache_queries", "As without gpu_", stats.prompt_tokens),
            ("vllm:gpu_prefix_cache_hits", "As without gpu_", stats.cached_tokens),
            ("vllm:num_preemptions", "Preemptions", stats.num_preemptions),
            ("vllm:corrupted_requests", "Sequences failed by NaN", stats.num_nan_sequences),
            ("pyserve:steps", "Steps", stats.num_steps),
        ):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        num_computed = stats.prompt_tokens - stats.cached_tokens
        sources = {"local_compute": num_computed, "local_cache_hit": stats.cached_tokens}
        text = "Prompt tokens, computed or found cached"
        yield self._counter("vllm:prompt_tokens_by_source", text, "source", sources)

    def _engine_histograms(self, stats: EngineStats) -> Iterable[Metric]:
        steps = stats.steps
        for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
            yield self._histogram(
                f"vllm:{name}", "Time from one token to the next", steps.inter_token_s
            )
        yield self._histogram("vllm:iteration_tokens_total", "Tokens of a step", steps.num_tokens)
        yield self._histogram("pyserve:step_seconds", "Duration of a step", steps.duration_s)

    def _config(self, info: EngineInfo) -> Metric:
        values = {
            "block_size": info.block_size,
            "cache_dtype": info.dtype,
            "enable_prefix_caching": info.enable_prefix_caching,
            "gpu_memory_utilization": info.gpu_memory_utilization,
            "num_gpu_blocks": info.num_blocks,
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache, as labels", labels=(*LABELS, *values)
        )
        family.add_metric((*self._labels, *map(str, values.values())), 1)
        return family

    def _counter(self, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*LABELS, label))
        for key, value in values.items():
            family.add_metric((*self._labels, key), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, histogram.cumulative(), histogram.total)
        return family


def _joined(names: Sequence[str]) -> str:
    """`names` for a label; beyond MAX_ADAPTERS only how many more there are."""
    more = [f"and {len(names) - MAX_ADAPTERS} more"] if len(names) > MAX_ADAPTERS else []
    return ",".join([*names[:MAX_ADAPTERS], *more])
