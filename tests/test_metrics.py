"""Series under vLLM's names, old and new, with the values that were observed."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import pyserve
from pyserve.client import EngineInfo, EngineStats, SequenceStream
from pyserve.histogram import INTER_TOKEN_BUCKETS_S, Histogram, StepHistograms, token_buckets
from pyserve.metrics import Metrics
from tests.machine import slowness

INFO = EngineInfo(
    max_model_len=2048, vocab_size=100, max_num_seqs=8, block_size=16, num_blocks=64,
    dtype="bfloat16", device="cpu", enable_prefix_caching=False, gpu_memory_utilization=0.75,
)  # fmt: skip
MAX_RENDER_S = 0.02  # on a busy machine; a few milliseconds on an idle one


def stats(steps: StepHistograms) -> EngineStats:
    return EngineStats(
        num_running=3, num_waiting=6, num_blocks_used=16, num_preemptions=5, num_steps=9,
        prompt_tokens=200, cached_tokens=50, output_tokens=70, step_age_s=0.25, error=None,
        num_device_allocations=7, num_awaiting=2, num_nan_sequences=1, steps=steps,
    )  # fmt: skip


def watched() -> tuple[Metrics, StepHistograms]:
    metrics, steps = Metrics("m"), StepHistograms()
    metrics.watch(lambda: stats(steps), INFO)
    metrics.watch_loop(lambda: 0.125)
    return metrics, steps


def samples(metrics: Metrics) -> dict[str, list[Any]]:
    """By name; those of the process itself are left out, as they have no labels."""
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if not sample.name.startswith("process_"):
                assert sample.labels["model_name"] == "m" and sample.labels["engine"] == "0"
                found.setdefault(sample.name, []).append(sample)
    return found


def by_label(found: dict[str, list[Any]], name: str, label: str) -> dict[str, float]:
    return {s.labels[label]: s.value for s in found[name]}


def test_adapters_are_shown_as_labels() -> None:
    metrics = Metrics("m")
    names = ('a "quoted"\\one', "b\u00e9", *(f"n{i:02}" for i in range(20)))
    told = replace(
        stats(StepHistograms()), running_adapters=names[:2], waiting_adapters=names[2:],
        num_adapter_loads=3, num_adapter_reads=2,
    )  # fmt: skip
    metrics.watch(lambda: told, INFO)
    assert "vllm:lora_requests_info" not in samples(metrics)
    metrics.watch(lambda: told, replace(INFO, num_adapter_slots=2))
    found = samples(metrics)
    (info,) = found["vllm:lora_requests_info"]
    assert abs(info.value - time.time()) < 60
    assert info.labels["max_lora"] == "2"
    assert info.labels["running_lora_adapters"] == 'a "quoted"\\one,b\u00e9'
    waiting = info.labels["waiting_lora_adapters"]
    assert waiting.startswith("n00,n01,") and waiting.endswith("n15,and 4 more")
    assert by_label(found, "pyserve:adapter_loads_total", "place") == {"host": 2, "device": 3}


def test_engine_figures_under_old_and_new_names() -> None:
    metrics = Metrics("m")
    assert "vllm:num_requests_running" not in samples(metrics)
    metrics, _ = watched()
    found = samples(metrics)
    values = {name: samples[0].value for name, samples in found.items()}
    assert values["vllm:num_requests_running"] == 3
    assert values["vllm:num_requests_waiting"] == 6
    assert by_label(found, "vllm:num_requests_waiting_by_reason", "reason") == {
        "capacity": 4,
        "deferred": 2,
    }
    assert by_label(found, "vllm:engine_sleep_state", "sleep_state") == {
        "awake": 1, "weights_offloaded": 0, "discard_all": 0,
    }  # fmt: skip
    assert values["vllm:num_requests_swapped"] == values["vllm:cpu_cache_usage_perc"] == 0
    assert values["vllm:kv_cache_usage_perc"] == values["vllm:gpu_cache_usage_perc"] == 0.25
    assert values["vllm:gpu_prefix_cache_hit_rate"] == 0.25
    assert values["vllm:prompt_tokens_total"] == 200
    assert values["vllm:generation_tokens_total"] == 70
    assert values["vllm:prefix_cache_queries_total"] == 200
    for name in ("prefix_cache_queries_total", "prefix_cache_hits_total"):
        assert values[f"vllm:gpu_{name}"] == values[f"vllm:{name}"]
    assert values["vllm:prefix_cache_hits_total"] == values["vllm:prompt_tokens_cached_total"] == 50
    assert by_label(found, "vllm:prompt_tokens_by_source_total", "source") == {
        "local_compute": 150,
        "local_cache_hit": 50,
    }
    assert values["vllm:num_preemptions_total"] == 5
    assert values["vllm:corrupted_requests_total"] == 1
    assert values["pyserve:device_allocations"] == 7
    assert values["pyserve:steps_total"] == 9
    assert values["pyserve:step_age_seconds"] == 0.25
    assert values["pyserve:loop_lag_seconds"] == 0.125


def test_the_cache_is_described_by_labels() -> None:
    metrics, _ = watched()
    (sample,) = samples(metrics)["vllm:cache_config_info"]
    assert sample.value == 1
    assert sample.labels == {
        "model_name": "m", "engine": "0", "block_size": "16", "cache_dtype": "bfloat16",
        "enable_prefix_caching": "False", "gpu_memory_utilization": "0.75",
        "num_gpu_blocks": "64",
    }  # fmt: skip


def test_the_engines_histograms_are_cumulative_under_both_names() -> None:
    metrics, steps = watched()
    steps.inter_token_s.observe(0.02, 3)
    steps.inter_token_s.observe(1000.0)
    steps.num_tokens.observe(300)
    steps.duration_s.observe(0.004)
    found = samples(metrics)
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        buckets = by_label(found, f"vllm:{name}_bucket", "le")
        assert (buckets["0.01"], buckets["0.025"], buckets["80.0"]) == (0, 3, 3)
        assert buckets["+Inf"] == found[f"vllm:{name}_count"][0].value == 4
        assert abs(found[f"vllm:{name}_sum"][0].value - 1000.06) < 1e-9
    buckets = by_label(found, "vllm:iteration_tokens_total_bucket", "le")
    assert (buckets["256.0"], buckets["512.0"]) == (0, 1)
    buckets = by_label(found, "pyserve:step_seconds_bucket", "le")
    assert (buckets["0.003"], buckets["0.005"]) == (0, 1)


def stream(*, queued_s: float, scheduled_s: float, first_s: float, ended_s: float) -> Any:
    found = SequenceStream(0, 300, queued_s=queued_s, first_token_s=first_s)
    found.num_cached_tokens = 100
    found.scheduled_s, found.ended_s = scheduled_s, ended_s
    return found


def test_a_sequence_is_observed_once_in_every_histogram() -> None:
    metrics, _ = watched()
    done = stream(queued_s=10.0, scheduled_s=11.0, first_s=13.0, ended_s=17.0)
    metrics.observe_sequence(done, "length", num_output_tokens=9, max_tokens=9, e2e_s=7.5)
    metrics.observe_prompt(2, 9)
    found = samples(metrics)
    for name, value in (
        ("e2e_request_latency_seconds", 7.5),
        ("request_queue_time_seconds", 1.0),
        ("time_in_queue_requests", 1.0),
        ("request_prefill_time_seconds", 2.0),
        ("request_decode_time_seconds", 4.0),
        ("request_inference_time_seconds", 6.0),
        ("request_time_per_output_token_seconds", 0.5),
        ("request_prompt_tokens", 300.0),
        ("request_prefill_kv_computed_tokens", 200.0),
        ("request_generation_tokens", 9.0),
        ("request_max_num_generation_tokens", 9.0),
        ("request_params_max_tokens", 9.0),
        ("request_params_n", 2.0),
    ):
        assert found[f"vllm:{name}_sum"][0].value == value, name
        assert found[f"vllm:{name}_count"][0].value == 1, name
    assert found["vllm:time_to_first_token_seconds_count"][0].value == 0, "observed when it comes"
    assert by_label(found, "vllm:request_prompt_tokens_bucket", "le")["500.0"] == 1
    assert by_label(found, "vllm:request_success_total", "finished_reason")["length"] == 1


def test_a_sequence_that_never_ran_has_only_waited() -> None:
    metrics, _ = watched()
    waited = stream(queued_s=10.0, scheduled_s=0.0, first_s=0.0, ended_s=14.0)
    metrics.observe_sequence(waited, "abort", num_output_tokens=0, max_tokens=9, e2e_s=4.0)
    assert (metrics.queue_time_s.count, metrics.queue_time_s.total) == (1, 4.0)
    assert metrics.inference_time_s.count == metrics.prefill_time_s.count == 0
    assert metrics.decode_time_s.count == metrics.request_time_per_output_token_s.count == 0


def test_a_value_on_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram(INTER_TOKEN_BUCKETS_S)
    histogram.observe(0.01)
    assert histogram.cumulative()[0] == ("0.01", 1.0)


@pytest.mark.parametrize(
    ("limit", "bounds"), [(1, (1.0,)), (9, (1.0, 2.0, 5.0)), (10, (1.0, 2.0, 5.0, 10.0))]
)
def test_token_buckets_end_at_the_context(limit: int, bounds: tuple[float, ...]) -> None:
    assert token_buckets(limit) == bounds


def test_every_reason_and_end_is_there_from_the_start() -> None:
    metrics = Metrics("m")
    metrics.num_finished["length"] += 2
    metrics.num_requests["aborted"] += 1
    metrics.num_responses[429] += 4
    metrics.num_responses[404] += 1
    found = samples(metrics)
    assert by_label(found, "vllm:request_success_total", "finished_reason") == {
        "stop": 0, "length": 2, "abort": 0, "error": 0,
    }  # fmt: skip
    assert by_label(found, "pyserve:requests_total", "end") == {
        "finished": 0, "aborted": 1, "failed": 0,
    }  # fmt: skip
    codes = by_label(found, "pyserve:http_responses_total", "code")
    assert codes == {"200": 0, "400": 0, "404": 1, "429": 4, "500": 0, "503": 0}


def test_two_servers_do_not_share_series() -> None:
    first, second = Metrics("m"), Metrics("m")
    first.e2e_latency_s.observe(1.0)
    assert samples(second)["vllm:e2e_request_latency_seconds_count"][0].value == 0


def test_rendering_does_not_hold_the_loop() -> None:
    metrics, _ = watched()
    metrics.render()
    fastest_s = 1.0
    for _ in range(5):
        began_s = time.perf_counter()
        metrics.render()
        fastest_s = min(fastest_s, time.perf_counter() - began_s)
    assert fastest_s < MAX_RENDER_S * slowness()


def test_every_series_of_the_board_exists() -> None:
    folder = Path(pyserve.__file__).parent / "api" / "pages" / "static"
    board = json.loads((folder / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [
        item["query"]["query"] for item in board["templating"]["list"] if item["type"] == "query"
    ]
    assert len(expressions) > 20
    found = samples(watched()[0])
    for expression in expressions:
        names = re.findall(r"\b(?:vllm|pyserve):\w+", expression)
        assert names, expression
        for name in names:
            assert name in found, name
        for label, value in re.findall(r'\b(code|end)="(\w+)"', expression):
            assert value in by_label(found, names[0], label), expression
