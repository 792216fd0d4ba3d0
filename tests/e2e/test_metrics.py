"""/metrics and the log of the real server after a known small load."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Server, start_server
from tests.waiting import wait_until

# What no dashboard for vLLM should miss, of 0.7 and of today.
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "time_in_queue_requests", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_max_num_generation_tokens", "request_params_n",
    "request_params_max_tokens", "request_prefill_kv_computed_tokens", "iteration_tokens_total",
)  # fmt: skip
TIMES = [name for name in HISTOGRAMS if name.endswith("_seconds")]
MAX_TOKENS = 12
PROMPT = "Once upon a time there was a little fox who lived in the forest. " * 2


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that nobody else has asked anything."""
    log = tmp_path_factory.mktemp("metrics") / "log"
    with start_server(log, "--enable-log-requests") as server:
        yield server


def values(server: Server) -> dict[str, float]:
    """Of every sample, by name and by its labels but the two that all have."""
    found = {}
    text = server.get("/metrics")[1].decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            key = sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def load(client: OpenAI) -> tuple[int, int, int]:
    """Two sequences of one prompt, then a stream; returns prompt, cached and output tokens."""
    whole = client.completions.create(
        model="", prompt=PROMPT, n=2, max_tokens=MAX_TOKENS, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    *_, last = client.completions.create(
        model="", prompt=PROMPT, max_tokens=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert whole.usage.completion_tokens == 2 * MAX_TOKENS and last.usage.completion_tokens == 1
    cached = last.usage.prompt_tokens_details.cached_tokens
    assert whole.usage.prompt_tokens == last.usage.prompt_tokens and cached
    return last.usage.prompt_tokens, cached, 2 * MAX_TOKENS + 1


def test_a_known_load_gives_the_right_counts(own: Server) -> None:
    before = values(own)
    assert all(before[f"vllm:{name}_count"] == 0 for name in HISTOGRAMS)
    began_s = time.monotonic()
    with own.client() as client:
        num_prompt_tokens, num_cached_tokens, num_output_tokens = load(client)
    took_s = time.monotonic() - began_s
    assert own.request("POST", "/v1/completions", b'{"prompt": "a", "n": 0}')[0] == 400
    own.wait_idle()
    after = values(own)

    counts = {name: after[f"vllm:{name}_count"] for name in HISTOGRAMS}
    num_steps = after["pyserve:steps_total"]
    assert counts.pop("iteration_tokens_total") == num_steps == after["pyserve:step_seconds_count"]
    assert num_steps >= MAX_TOKENS
    assert counts.pop("request_params_n") == counts.pop("request_max_num_generation_tokens") == 2
    assert counts.pop("request_time_per_output_token_seconds") == 2, "one had a single token"
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert counts.pop(name) == num_output_tokens - 3
    assert set(counts.values()) == {3}, counts

    sums = {name: after[f"vllm:{name}_sum"] for name in HISTOGRAMS}
    assert sums["request_prompt_tokens"] == 3 * num_prompt_tokens
    assert sums["request_generation_tokens"] == num_output_tokens
    assert sums["request_params_max_tokens"] == 2 * MAX_TOKENS + 1
    assert sums["request_max_num_generation_tokens"] == MAX_TOKENS + 1
    assert sums["request_params_n"] == 3
    assert all(0.0 <= sums[name] < 3 * took_s for name in TIMES)
    parts = sums["request_queue_time_seconds"] + sums["request_inference_time_seconds"]
    assert parts <= sums["e2e_request_latency_seconds"]
    inference = sums["request_prefill_time_seconds"] + sums["request_decode_time_seconds"]
    assert inference == pytest.approx(sums["request_inference_time_seconds"])

    hits = after["vllm:prefix_cache_hits_total"]
    assert hits >= num_cached_tokens
    assert sums["request_prefill_kv_computed_tokens"] == 3 * num_prompt_tokens - hits
    assert after["vllm:prefix_cache_queries_total"] == 3 * num_prompt_tokens
    assert after["vllm:prompt_tokens_total"] == 3 * num_prompt_tokens
    assert after["vllm:generation_tokens_total"] == num_output_tokens
    assert after["vllm:request_success_total{finished_reason=length}"] == 3
    assert after["pyserve:requests_total{end=finished}"] == 2
    assert after["pyserve:http_responses_total{code=400}"] == 1
    assert after["pyserve:loop_lag_seconds"] >= 0.0
    assert after["process_resident_memory_bytes"] > 1e7


def test_the_log_has_one_line_for_every_request_and_no_texts(own: Server) -> None:
    with own.client() as client:
        load(client)
    wait_until(lambda: own.log.read_text().count(" finished (") >= 2, explain=own.log.read_text)
    text = own.log.read_text()
    lines = [line for line in text.splitlines() if " request " in line]
    ids = [re.search(r" request (\S+) ", line) for line in lines]
    ended = [i.group(1) for i, line in zip(ids, lines, strict=True) if i and " arrived" not in line]
    assert len(ended) == len(set(ended)) >= 2
    assert "little fox" not in text
    assert "Traceback" not in text


def test_the_board_is_served(own: Server) -> None:
    status, body = own.get("/static/grafana.json")
    assert status == 200 and json.loads(body)["title"] == "pyserve"
