"""Series under vLLM's names, old and new, with the values that were observed."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pyserve.client import EngineStats
from pyserve.metrics import INTER_TOKEN_BUCKETS_S, Histogram, Metrics

STATS = EngineStats(
    num_running=3, num_waiting=2, num_blocks_used=16, num_preemptions=5, num_steps=9,
    prompt_tokens=200, cached_tokens=50, output_tokens=70, step_age_s=0.0, error=None,
    num_device_allocations=7,
)  # fmt: skip


def samples(metrics: Metrics) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "m" and sample.labels["engine"] == "0"
            found.setdefault(sample.name, []).append(sample)
    return found


def test_engine_figures_under_old_and_new_names() -> None:
    metrics = Metrics("m")
    assert "vllm:num_requests_running" not in samples(metrics)
    metrics.watch(lambda: STATS, 64)
    values = {name: found[0].value for name, found in samples(metrics).items()}
    assert values["vllm:num_requests_running"] == 3
    assert values["vllm:num_requests_waiting"] == 2
    assert values["vllm:kv_cache_usage_perc"] == values["vllm:gpu_cache_usage_perc"] == 0.25
    assert values["vllm:gpu_prefix_cache_hit_rate"] == 0.25
    assert values["vllm:prompt_tokens_total"] == 200
    assert values["vllm:generation_tokens_total"] == 70
    assert values["vllm:prefix_cache_queries_total"] == 200
    assert values["vllm:prefix_cache_hits_total"] == 50
    assert values["vllm:num_preemptions_total"] == 5
    assert values["pyserve:device_allocations"] == 7


def test_histograms_are_cumulative() -> None:
    metrics = Metrics("m")
    metrics.inter_token_latency_s.observe(0.02, 3)
    metrics.inter_token_latency_s.observe(1000.0)
    found = samples(metrics)
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        buckets = {s.labels["le"]: s.value for s in found[f"vllm:{name}_bucket"]}
        assert (buckets["0.01"], buckets["0.025"], buckets["80.0"]) == (0, 3, 3)
        assert buckets["+Inf"] == found[f"vllm:{name}_count"][0].value == 4
        assert abs(found[f"vllm:{name}_sum"][0].value - 1000.06) < 1e-9


def test_a_value_on_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram(INTER_TOKEN_BUCKETS_S)
    histogram.observe(0.01)
    assert histogram.cumulative()[0] == ("0.01", 1.0)


def test_every_finished_reason_is_there_from_the_start() -> None:
    metrics = Metrics("m")
    metrics.num_finished["length"] += 2
    counts = {
        s.labels["finished_reason"]: s.value for s in samples(metrics)["vllm:request_success_total"]
    }
    assert counts == {"stop": 0, "length": 2, "abort": 0, "error": 0}


def test_two_servers_do_not_share_series() -> None:
    first, second = Metrics("m"), Metrics("m")
    first.e2e_latency_s.observe(1.0)
    assert samples(second)["vllm:e2e_request_latency_seconds_count"][0].value == 0
