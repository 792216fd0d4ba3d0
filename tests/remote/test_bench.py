"""bench serve: vLLM's labels, its JSON's keys, figures by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.stub import MODEL, StubConfig, running_stub
from pyserve.cli import main
from pyserve.remote.bench import measure
from pyserve.remote.workload import RequestRecord

LABELS = [
    "Successful requests:", "Failed requests:", "Maximum request concurrency:",
    "Benchmark duration (s):", "Total input tokens:", "Total generated tokens:",
    "Request throughput (req/s):", "Request goodput (req/s):", "Output token throughput (tok/s):",
    "Peak output token throughput (tok/s):", "Peak concurrent requests:",
    "Total token throughput (tok/s):", "Mean TTFT (ms):", "Median TTFT (ms):", "P99 TTFT (ms):",
    "Mean TPOT (ms):", "Median TPOT (ms):", "P99 TPOT (ms):", "Mean ITL (ms):",
    "Median ITL (ms):", "P99 ITL (ms):",
]  # fmt: skip


def test_what_scripts_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_stub(StubConfig()) as (url, stub):
        flags = ["--base-url", url, "--num-prompts", "6", "--random_input_len", "9"]
        flags += ["--random-output-len=5", "--max-concurrency", "3", "--ignore-eos"]
        flags += ["--goodput", "ttft:60000", "--save-result", "--result-dir", str(tmp_path)]
        assert main(["bench", "serve", *flags, "--tokenizer", "x", "--metadata", "run=1"]) == 0
        body = stub.seen[-1]
    assert len(body["prompt"]) == 9 and max(body["prompt"]) < 1000
    assert (body["max_tokens"], body["ignore_eos"], body["model"]) == (5, True, MODEL)
    assert body["stream_options"] == {"include_usage": True}, "not in every frame"
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(" Serving Benchmark Result ".center(50, "=")) :]
    labels = [line[:40].strip() for line in table if line[:1] not in "-="]
    assert labels == LABELS and table[-1] == "=" * 50
    assert table[1] == f"{'Successful requests:':<40} 6         "
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"openai-infqps-concurrency3-{MODEL}-")
    result = json.loads(path.read_text())
    assert (result["completed"], result["failed"], result["num_prompts"]) == (6, 0, 6)
    assert (result["total_output_tokens"], result["max_concurrency"]) == (30, 3)
    assert (result["request_rate"], result["run"], result["model_id"]) == ("inf", "1", MODEL)
    assert {"mean_ttft_ms", "p99_itl_ms", "std_e2el_ms", "date", "burstiness"} <= set(result)
    assert "ttfts" not in result and result["request_goodput"] == result["request_throughput"]


def test_chats_of_a_file_at_a_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    with running_stub(StubConfig(fail_every=3)) as (url, stub):
        flags = ["--backend", "openai-chat", "--base-url", url, "--dataset-name", "custom"]
        flags += ["--dataset-path", str(tmp_path / "in"), "--num-prompts", "5"]
        flags += ["--request-rate", "200", "--burstiness", "2", "--custom-output-len", "3"]
        flags += ["--save-detailed", "--result-filename", str(tmp_path / "out.json")]
        assert main(["bench", "serve", *flags]) == 1
        asked = {body["messages"][0]["content"] for body in stub.seen}
    assert asked == {"one", "two"}
    out, err = capsys.readouterr()
    assert f"{'Failed requests:':<40} 2" in out and "error x2: HTTP 500" in err
    assert f"{'Request rate configured (RPS):':<40} 200.00" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["ttfts"]) == 5 and sum(map(bool, result["errors"])) == 2


def test_figures_by_hand() -> None:
    record = RequestRecord(
        number=0, started_s=0.0, ended_s=2.0, first_s=0.5, last_s=1.9, gaps=[0.7, 0.7],
        gap_tokens=[], num_prompt_tokens=10, num_cached_tokens=0, num_output_tokens=6,
        num_asked_tokens=6, has_usage=True, late_s=0.0, error=None,
    )  # fmt: skip
    figures = measure([record], {"ttft": 500.0, "tpot": 279.0}, [50.0])
    assert figures["mean_ttft_ms"] == 500.0 and figures["mean_e2el_ms"] == 2000.0
    assert figures["p50_tpot_ms"] == pytest.approx(280.0)
    assert figures["median_itl_ms"] == pytest.approx(700.0)
    assert (figures["output_throughput"], figures["total_token_throughput"]) == (3.0, 8.0)
    assert figures["request_goodput"] == 0.0, "tpot is above its goal"
    assert figures["max_output_tokens_per_s"] == 4.0 and figures["max_concurrent_requests"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "pyserve bench serve"),
        (["throughput"], "pyserve has one bench"),
        (["serve", "--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["serve", "--request-rate", "5", "--max-concurrency", "2"], "is not built yet: give one"),
        (["serve", "--percentile-metrics", "ttft,x"], "takes ttft, tpot, itl, e2el, got x"),
        (["serve", "--metric-percentiles", "101"], "--metric-percentiles takes 50,99"),
        (["serve", "--goodput", "itl:3"], "--goodput takes ttft, tpot or e2el"),
        (["serve", "--dataset-name", "custom"], "needs --dataset-path FILE"),
        (["serve", "--extra-body", "[]"], "--extra-body must be a JSON object"),
        (["serve", "--dataset-name", "sharegpt"], "--dataset-name"),
        (["serve", "--random-range-ratio", "1"], "must be in [0, 1)"),
        (["serve", "--endpoint", "/x"], "--endpoint must be"),
    ],
)
def test_what_is_refused(argv: list[str], words: str, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["bench", *argv]) == 2
    assert words in caplog.text


def test_no_server(caplog: pytest.LogCaptureFixture) -> None:
    with running_stub() as (url, _):
        pass
    assert main(["bench", "serve", "--base-url", url, "--ready-check-timeout-sec", "0"]) == 1
    assert "no server answers at" in caplog.text
