"""The figures: percentiles, tokens counted by usage, errors that stay visible."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench.report import format_ms, format_table, summarize
from bench.serve import aggregate, main, measure, render
from bench.stub import MODEL, StubConfig, running_stub
from pyserve.remote.workload import (
    LoadSpec,
    RequestRecord,
    WorkerReport,
    time_per_output_token,
)

RECORD = RequestRecord(
    number=0, started_s=10.0, ended_s=11.5, first_s=10.5, last_s=11.4, gaps=[0.3, 0.3, 0.3],
    gap_tokens=[],
    num_prompt_tokens=100, num_cached_tokens=16, num_output_tokens=10, num_asked_tokens=10,
    has_usage=True, late_s=0.0, error=None,
)  # fmt: skip


def load_on(config: StubConfig, **fields: object) -> tuple[LoadSpec, dict]:  # type: ignore[type-arg]
    with running_stub(config) as (url, _):
        spec = LoadSpec(url=url, models=(MODEL,), num_requests=12, concurrency=4)
        spec = msgspec.structs.replace(spec, output_len=(10, 10), **fields)
        return spec, measure(spec, 1)


def test_percentiles() -> None:
    summary = summarize([float(i) for i in range(101)])
    assert summary == {"mean": 50, "p50": 50, "p90": 90, "p99": 99, "max": 100, "count": 101}
    assert summarize([1.0, 2.0])["p90"] == pytest.approx(1.9)  # type: ignore[index]
    assert summarize([]) is None


def test_aggregate_by_hand() -> None:
    failed = msgspec.structs.replace(RECORD, number=1, ended_s=20.0, error="HTTP 500: x")
    result = aggregate([WorkerReport([RECORD, failed], cpu_s=1.0, wall_s=4.0, num_resent=0)])
    assert time_per_output_token(RECORD) == pytest.approx(0.1)
    assert result["wall_s"] == 10.0
    assert result["output_tokens_per_s"] == 1.0
    assert result["total_tokens_per_s"] == 11.0
    assert result["requests_per_s"] == 0.1
    assert result["tokens_per_frame"] == 2.5
    assert result["ttft_s"]["p50"] == 0.5
    assert result["tpot_s"]["p99"] == pytest.approx(0.1)
    assert result["itl_s"]["p50"] == 0.3 and result["itl_s"]["count"] == 3
    assert result["e2e_s"]["max"] == 1.5
    assert result["cached_tokens"] == 16
    assert result["errors"] == {"HTTP 500: x": 1}
    assert result["client_busy"] == [0.25]


def test_gaps_of_one_token_by_hand() -> None:
    held = msgspec.structs.replace(RECORD, gaps=[0.2, 0.7, 0.4], gap_tokens=[1, 2, 1])
    ended = msgspec.structs.replace(RECORD, gaps=[0.5, 0.1], gap_tokens=[1, 0])
    result = aggregate([WorkerReport([held, ended], cpu_s=1.0, wall_s=4.0, num_resent=0)])
    assert result["itl_s"]["max"] == 0.7 and result["itl_s"]["count"] == 5
    assert result["one_token_itl_s"]["max"] == 0.5 and result["one_token_itl_s"]["count"] == 3
    assert result["longest_gap_tokens"] == 2
    # One stream that was not counted could hold the longest gap of one token.
    result = aggregate([WorkerReport([held, RECORD], cpu_s=1.0, wall_s=4.0, num_resent=0)])
    assert result["one_token_itl_s"] is None and result["longest_gap_tokens"] is None


def test_gaps_of_one_token_are_shown_where_they_are_known() -> None:
    config = StubConfig(held_frame=4)
    spec, result = load_on(config, has_continuous_usage=True, num_requests=4)
    assert result["longest_gap_tokens"] in (1, 2)
    assert (result["itl_s"]["count"], result["one_token_itl_s"]["count"]) == (32, 28)
    assert "ITL (one token)" in render(spec, result)
    spec, result = load_on(config, num_requests=4)
    assert result["one_token_itl_s"] is None and result["longest_gap_tokens"] is None
    shown = render(spec, result)
    assert "ITL (one token)" not in shown and "of one token" not in shown
    spec, result = load_on(StubConfig(has_usage=False), has_continuous_usage=True)
    shown = render(spec, result)
    assert "ITL (one token)" not in shown
    assert "! the server did not count the tokens of every frame" in shown


@pytest.mark.parametrize("is_chat", [False, True])
def test_coalesced_frames_do_not_lose_tokens(is_chat: bool) -> None:
    spec, result = load_on(StubConfig(tokens_per_frame=4), is_chat=is_chat)
    assert result["output_tokens"] == 120
    assert result["tokens_per_frame"] == pytest.approx(10 / 3)
    assert result["num_errors"] == 0
    assert "frames hold several tokens" in render(spec, result)


def test_answers_without_usage_are_marked() -> None:
    spec, result = load_on(StubConfig(tokens_per_frame=4, has_usage=False))
    assert result["num_without_usage"] == 12
    assert result["output_tokens"] == 36
    assert "a lower bound" in render(spec, result)


def test_short_answers_are_marked() -> None:
    spec, result = load_on(StubConfig(short_by=3))
    assert result["num_short"] == 12
    assert "12 answers are shorter" in render(spec, result)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (StubConfig(fail_every=3), "HTTP 500: stub failure"),
        (StubConfig(break_every=3), "connection lost after 5 frames"),
        (StubConfig(error_frame_every=3), "error in the stream: stub stream error"),
    ],
)
def test_errors_are_counted_and_shown(config: StubConfig, text: str) -> None:
    spec, result = load_on(config)
    assert result["num_errors"] == 4 and result["num_good"] == 8
    assert result["output_tokens"] == 80
    assert f"error x4: {text}" in render(spec, result)


def test_a_dead_server_is_all_errors() -> None:
    with running_stub() as (url, _):
        pass
    spec = LoadSpec(url=url, models=(MODEL,), num_requests=4, concurrency=2)
    result = measure(spec, 1)
    assert result["num_errors"] == 4
    assert "error x4: cannot connect" in render(spec, result)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with running_stub() as (url, stub):
        flags = ["--url", url, "-c", "2", "--output-len", "3:5", "--processes", "1"]
        flags += ["--continuous-usage", "--api-key", "secret"]
        assert main([*flags, "--seed", "7", "--json", str(out)]) == 0
        assert stub.num_requests == 2 + 4  # warm-up and 2 per slot
    printed = capsys.readouterr().out
    assert "ITL (one token)" in printed
    assert "TTFT" in printed and "seed 7" in printed and MODEL in printed
    written = json.loads(out.read_text())
    assert written["config"]["output_len"] == [3, 5]
    assert written["config"]["api_key"] is None and "secret" not in out.read_text()
    assert written["server"]["models"] == [MODEL]
    assert written["result"]["num_good"] == 4
    assert written["environment"]["cores"] >= 1


def test_command_line_failures(capsys: pytest.CaptureFixture[str]) -> None:
    with running_stub(StubConfig(fail_every=1)) as (url, _):
        assert main(["--url", url, "--processes", "1"]) == 1
    assert "warm-up error x1: HTTP 500" in capsys.readouterr().err
    assert main(["--url", url]) == 1
    assert "/v1/models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--concurrency", "0"])
    assert "--concurrency" in capsys.readouterr().err


def test_self_test_prints_the_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--self-test", "-c", "8", "--processes", "1", "--output-len", "50"]) == 0
    assert "us of CPU per frame" in capsys.readouterr().out


def test_formatting() -> None:
    assert [format_ms(s) for s in (0.00123, 0.1234, 12.3456)] == ["1.23", "123.4", "12,346"]
    table = format_table([["a", "bb"], ["ccc", "1"]])
    assert table.splitlines() == ["a    bb", "---  --", "ccc   1"]
