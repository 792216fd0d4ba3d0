"""The soak aborts its share, checks every answer and fails on what is held or differs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bench.soak import main, mixed_request
from bench.stub import StubConfig, running_stub


def soak_on(config: StubConfig, *flags: str) -> int:
    with running_stub(config) as (url, _):
        return main(["--url", url, "-n", "150", "-c", "16", *flags])


def test_requests_are_mixed_and_legal() -> None:
    rng = np.random.default_rng(0)
    requests = [mixed_request(rng, 100) for _ in range(300)]
    bodies = [body for _, body in requests]
    assert {path for path, _ in requests} == {"/v1/chat/completions", "/v1/completions"}
    assert {body["n"] for body in bodies} == {1, 2, 3}
    assert {body["stream"] for body in bodies} == {True, False}
    assert all(0 <= body.get("min_tokens", 0) <= body["max_tokens"] for body in bodies)
    optional = {"stop", "seed", "top_p", "top_k", "min_p", "logit_bias", "repetition_penalty"}
    assert optional <= {name for body in bodies for name in body}
    json.dumps(bodies)  # plain numbers only
    ids = [body["prompt"] for body in bodies if isinstance(body.get("prompt"), list)]
    assert ids and all(0 <= token < 100 for prompt in ids for token in prompt)


def test_a_sound_server_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    pid = str(os.getpid())
    flags = ["--pid", pid, "--json", str(out), "--max-growth-mib", "200", "--api-key", "secret"]
    assert soak_on(StubConfig(delay_s=0.002), *flags) == 0
    assert "server RSS MiB" in capsys.readouterr().out
    assert "secret" not in out.read_text()
    result = json.loads(out.read_text())["result"]
    assert result["num_complete"] + result["num_aborted"] == 150
    assert 20 <= result["num_aborted"] <= 60
    assert result["failures"] == {} and len(result["rss_bytes"]) == 5


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (StubConfig(fail_every=10), "HTTP 500: stub failure"),
        (StubConfig(break_every=10), "connection lost"),
        (StubConfig(has_usage=False), "requests: no usage"),
        (StubConfig(leaked_requests=1), "FAILED requests running: 1"),
    ],
)
def test_what_is_wrong_is_printed(
    config: StubConfig,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bench.soak.IDLE_TIMEOUT_S", 0.1)
    assert soak_on(config) == 1
    assert text in capsys.readouterr().out


def test_memory_that_grows_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak_on(StubConfig(), "--pid", str(os.getpid()), "--max-growth-mib", "-1000") == 1
    assert "FAILED memory grew" in capsys.readouterr().out


def test_equal_streams_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak_on(StubConfig(), "--streams", "64", "--exact") == 0
    assert "64 of 64 streams equal" in capsys.readouterr().out


def test_streams_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    # The stub spoils every 20th answer: none of the first 16, alone, then 4 of 64.
    config = StubConfig(spoil_every=20)
    assert soak_on(config, "--streams", "64", "--exact") == 1
    printed = capsys.readouterr().out
    assert "60 of 64 streams equal" in printed and "FAILED 4 streams differ, 0 may" in printed
    assert "spoilt" in printed
    assert soak_on(config, "--streams", "64") == 0  # within what ties may explain


def test_a_stream_that_stands_still(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--streams", "4", "--max-tokens", "3", "--max-gap-s", "0.01"]
    assert soak_on(StubConfig(delay_s=0.02), *flags) == 1
    assert "FAILED a stream stood still" in capsys.readouterr().out


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with running_stub() as (url, _):
        pass
    assert main(["--url", url, "--streams", "2"]) == 1
    assert "cannot connect" in capsys.readouterr().err


def test_a_soak_of_so_many_seconds(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["--seconds", "1", "-n", "10000000", "--json", str(out)]
    assert soak_on(StubConfig(delay_s=0.002), *flags) == 0
    result = json.loads(out.read_text())["result"]
    assert 1.0 <= result["wall_s"] < 10.0 and result["num_complete"] > 10


@pytest.mark.parametrize(
    ("allocations", "mib", "problem"),
    [
        ([7] * 6, [1000, 1001, 1000, 1002, 1001, 1002], None),
        ([7, 7, 8, 8, 8, 8], [1000] * 6, "FAILED 1 device allocations after ready"),
        ([7] * 6, [1000, 1000, 1000, 1064, 1064, 1064], "FAILED GPU memory in use went from 1000"),
    ],
)
def test_the_device_is_watched(
    allocations: list[int],
    mib: list[int],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readings = iter(zip(allocations, mib, strict=True))

    async def read_device(endpoint: object) -> tuple[int, int]:
        return next(readings)

    monkeypatch.setattr("bench.soak.read_device", read_device)
    assert soak_on(StubConfig(), "--device-memory") == (problem is not None)
    printed = capsys.readouterr().out
    assert "device allocations: 7 7 " in printed
    assert problem is None or problem in printed


def test_a_server_that_does_not_count_allocations(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak_on(StubConfig(), "--device-memory") == 1
    assert "/metrics has no pyserve:device_allocations" in capsys.readouterr().err
