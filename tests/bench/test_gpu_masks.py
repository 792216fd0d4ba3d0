"""bench.gpu_masks against the stub: what it asks for, its medians, its bar."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_masks
from bench.gpu_masks import BODIES, PLAIN, SCHEMA, summary
from tests.bench.test_gpu_serve import Started


def test_the_cost_is_that_of_the_medians() -> None:
    rows, cost = summary({PLAIN: [(90, 5), (100, 6), (900, 9)], SCHEMA: [(95, 7), (96, 8), (1, 7)]})
    assert cost == pytest.approx(0.05)
    assert rows[1][1:4] == ["100", "90 100 900", "6.00"]
    assert rows[2] == [SCHEMA, "95", "95 96 1", "7.00", "7.00 8.00 7.00", "5.0%"]


@pytest.mark.parametrize(("rate", "code"), [(97.0, 0), (90.0, 1)])
def test_turns(
    rate: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked: list[dict[str, Any]] = []

    @contextmanager
    def running_server(flags: list[str]) -> Iterator[Started]:
        assert flags == ["--model", "m", "--max-model-len", "4096", "--device", "cuda"]
        yield Started("http://server", os.getpid(), tmp_path / "log")

    def measure(
        url: str, load: tuple[int, int, int], out: Path, body: dict[str, Any]
    ) -> dict[str, Any]:
        assert url == "http://server" and load == (128, 256, 64)
        asked.append(body)
        return {
            "output_tokens_per_s": 100.0 if not body else rate,
            "tpot_s": {"p50": 0.006},
            "errors": {},
        }

    monkeypatch.setattr(gpu_masks, "running_server", running_server)
    monkeypatch.setattr(gpu_masks, "measure", measure)
    path = tmp_path / "masks.json"
    argv = ["--model", "m", "--turns", "2", "--json", str(path), "--", "--device", "cuda"]
    assert gpu_masks.main(argv) == code
    assert asked == [*BODIES.values()] * 2
    printed = capsys.readouterr().out
    assert ("FAILED the schema costs 10.0%, more than 5%" in printed) == bool(code)
    assert len(json.loads(path.read_text())["runs"][SCHEMA]) == 2


def test_what_is_compared_must_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_masks.main(["--model", "m", "--kinds", PLAIN])
    assert SCHEMA in capsys.readouterr().err
