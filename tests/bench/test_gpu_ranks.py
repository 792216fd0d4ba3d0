"""bench.gpu_ranks against the stub: its servers, its lines, and what it calls a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_ranks
from bench.stub import StubConfig, running_stub
from tests.bench.test_gpu_serve import Started

LEDGER = "the ledger says 124.98 GiB, the card shows 125.83 GiB (-0.7%)"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Flags of each server."""
    flags_of: list[list[str]] = []

    @contextmanager
    def running_server(flags: list[str]) -> Iterator[Started]:
        flags_of.append(flags)
        log = tmp_path / "log"
        log.write_text(f"memory, with 7 blocks: {LEDGER}\n")
        with running_stub(StubConfig()) as (url, _):
            yield Started(url, os.getpid(), log)

    monkeypatch.setattr(gpu_ranks, "running_server", running_server)
    return flags_of


def run(tmp_path: Path, *flags: str) -> int:
    folders = ["--folder", str(tmp_path / "models"), "--out", str(tmp_path)]
    return gpu_ranks.main([*folders, "--cards", "4", "--preset", "tiny", *flags])


def test_loads_are_served_by_all_cards(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--loads", "8/4x1", "16/4x5", "--parts", "served") == 0
    [flags] = started
    assert flags[flags.index("--tensor-parallel-size") + 1] == "4"
    assert "dummy" in flags and flags[-2:] == ["--device", "cuda"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("= ")]
    assert lines[0] == "= tiny on 4: ready after 1.5 s"
    assert lines[1] == f"= {LEDGER}, asked 3: met"
    assert [line.partition(":")[0] for line in lines[2:]] == ["= 8/4 x1", "= 16/4 x5"]
    assert all("floor 0.0" in line for line in lines[2:])


@pytest.mark.parametrize(("error", "verdict"), [(1.2, "met"), (1.3, "MISSED")])
def test_all_cards_may_be_a_quarter_less_exact_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: float, verdict: str,
) -> None:  # fmt: skip
    asked: list[list[str]] = []

    def prompt_logprobs(folder: Path, prompt: list[int], flags: list[str]) -> list[float]:
        asked.append(flags)
        wrong = {"float32": 0.0, "1": 1.0, "4": error}
        [by] = [wrong[word] for word in flags if word in wrong]
        return [-3.0 + by, -2.0 - by]

    monkeypatch.setattr(gpu_ranks, "prompt_logprobs", prompt_logprobs)
    assert run(tmp_path, "--layers", "1", "--parts", "right") == (verdict == "MISSED")
    assert len(asked) == 3 and asked[0] == ["--device", "cpu", "--dtype", "float32"]
    assert capsys.readouterr().out.splitlines()[0].endswith(verdict)


def test_what_cannot_run_fails_and_the_next_part_runs(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*args: Any) -> float:
        raise RuntimeError("not ready")

    monkeypatch.setattr(gpu_ranks, "prompt_logprobs", fail)
    assert run(tmp_path, "--loads", "8/4x1", "--layers", "1", "--parts", "right", "served") == 1
    out = capsys.readouterr().out
    assert "FAILED right: not ready" in out and "= 8/4 x1" in out
