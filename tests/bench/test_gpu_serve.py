"""bench.gpu_serve against the stub: the load it sends, its table, its failures."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import gpu_serve, server_process
from bench.server_process import StartTimes
from bench.stub import StubConfig, running_stub


@dataclass
class Started:
    """Stands for a server process."""

    url: str
    pid: int
    log: Path

    def wait_ready(self, timeout_s: float) -> StartTimes:
        return StartTimes(ready_s=1.5, phases={"load": 0.5, "ready": 1.5})


@pytest.fixture
def stub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The flags that the server was started with; the stub behaves as the test's parameter says."""
    given: list[str] = []

    @contextmanager
    def running_server(flags: list[str], command: tuple[str, ...] = ()) -> Iterator[Started]:
        given.extend([*command, *flags])
        (tmp_path / "log").write_text("a line of the server\n")
        with running_stub(request.param) as (url, _):
            yield Started(url, os.getpid(), tmp_path / "log")

    monkeypatch.setattr(gpu_serve, "running_server", running_server)
    return given


def run(tmp_path: Path, *flags: str) -> int:
    out = ["--out", str(tmp_path), "--json", str(tmp_path / "all.json")]
    return gpu_serve.main(["--model", "/some/model", *out, *flags])


@pytest.mark.parametrize("stub", [StubConfig()], indirect=True)
def test_a_row_for_each_load(
    stub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--loads", "128/512x1", "16/4x3", "--", "--device", "cuda") == 0
    assert stub == ["--model", "/some/model", "--max-model-len", "16384", "--device", "cuda"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 3  # the header too
    assert rows[1].startswith("| 128/512, 1 |") and "| 205, 13.1, 4.86 | TPOT 3.57 ms |" in rows[1]
    assert rows[2].startswith("| 16/4, 3 |") and rows[2].endswith("|  |  |")
    sent = json.loads((tmp_path / "serve-128-512-1.json").read_text())["config"]
    assert sent["num_requests"] == 3 and sent["ignore_eos"] and sent["temperature"] == 0.0
    assert not sent["is_chat"] and not sent["is_text"] and sent["request_rate"] is None
    assert json.loads((tmp_path / "serve-16-4-3.json").read_text())["config"]["num_requests"] == 6
    assert len(json.loads((tmp_path / "all.json").read_text())["results"]) == 2


@pytest.mark.parametrize("stub", [StubConfig()], indirect=True)
def test_another_model_has_floors_and_limits_of_its_own(
    stub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "gemma2", "max_position_embeddings": 8192, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--model", str(tmp_path), "--out", str(tmp_path), "--loads", "128/512x1"]
    assert gpu_serve.main(flags) == 0
    assert stub[2:] == ["--max-model-len", "8192"]
    sent = json.loads((tmp_path / "serve-128-512-1.json").read_text())["config"]
    assert sent["vocab_size"] == 768
    assert gpu_serve.main([*flags, "--beside", "32/2x1"]) == 0
    for name in ("serve-128-512-1.json", "serve-32-2-1.json"):
        assert json.loads((tmp_path / name).read_text())["config"]["vocab_size"] == 768
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 128")]
    assert "|  | TPOT 4.4 ms; at the rate of the 8B 4.7, asked 5.15 |" in rows[0]


@pytest.mark.parametrize("stub", [StubConfig(fail_every=4)], indirect=True)
def test_failed_requests_fail_the_run(
    stub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--loads", "8/4x4") == 1
    assert "FAILED 8/4, 4: " in capsys.readouterr().out


def test_a_server_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = server_process.running_server
    monkeypatch.setattr(
        gpu_serve,
        "running_server",
        lambda flags: real(flags, command=(sys.executable, "-c", "raise SystemExit('no card')")),
    )
    assert run(tmp_path) == 1
    assert "FAILED the server ended with exit code 1" in capsys.readouterr().out


def test_a_load_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_serve.main(["--model", "x", "--loads", "128x512"])
    assert "want IN/OUTxCONCURRENCY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stub", "gap", "num_one_token"),
    [
        (StubConfig(held_frame=2), r"\(a frame of (1 token|2 tokens)\), of one token [\d.]+ ms", 9),
        (StubConfig(tokens_per_frame=2), r"\(a frame of 2 tokens\), of one token - ms", 0),
    ],
    indirect=["stub"],
)
def test_prompts_beside_a_load(
    stub: list[str], gap: str, num_one_token: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(tmp_path, "--loads", "16/6x3", "--beside", "32/2x5") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("= beside")]
    assert "beside 5 prompts of 32, whose TTFT is" in line
    assert re.search(rf": longest gap [\d.]+ ms {gap}$", line)
    figures = json.loads((tmp_path / "all.json").read_text())["results"]["16/6, 3"]
    assert figures["e2e_s"]["count"] == 3 and figures["beside"]["e2e_s"]["count"] == 5
    assert (figures["one_token_itl_s"] or {"count": 0})["count"] == num_one_token
    config = json.loads((tmp_path / "serve-32-2-1.json").read_text())["config"]
    assert not config["has_continuous_usage"]


@pytest.mark.parametrize("stub", [StubConfig(has_usage=False)], indirect=True)
def test_a_server_that_counts_no_frames_has_one_longest_gap(
    stub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--loads", "16/4x3", "--beside", "32/2x1") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("= beside")]
    assert re.search(r"longest gap [\d.]+ ms$", line)
