"""bench.gpu_models against the stub: each model's server and loads, its lines, its failures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import gpu_models
from bench.gpu_models import MODELS, Served
from bench.model_presets import PRESETS
from bench.stub import StubConfig, running_stub
from pyserve.model.config import ModelConfig
from tests.bench.test_gpu_serve import Started

TINY = [
    Served("tiny", {(8, 4, 1): ("TPOT", 60_000.0), (16, 4, 5): ("TTFT", 1e-6)}),
    Served("tiny", {(8, 4, 2): None}, method="fp8"),
]


@pytest.fixture
def given(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """Flags of each server; the stub behaves as the test's parameter says."""
    started: list[list[str]] = []

    @contextmanager
    def running_server(flags: list[str]) -> Iterator[Started]:
        started.append(flags)
        with running_stub(request.param) as (url, _):
            yield Started(url, os.getpid(), tmp_path / "log")

    monkeypatch.setattr(gpu_models, "running_server", running_server)
    monkeypatch.setattr(gpu_models, "MODELS", TINY)
    return started


def run(tmp_path: Path, *flags: str) -> int:
    folders = ["--folder", str(tmp_path / "models"), "--out", str(tmp_path)]
    return gpu_models.main([*folders, "--json", str(tmp_path / "all.json"), *flags])


@pytest.mark.parametrize("given", [StubConfig()], indirect=True)
def test_a_line_for_each_load(
    given: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    folder = str(tmp_path / "models" / "tiny-shapes")
    plain = ["--model", folder, "--max-model-len", "2048", "--device", "cuda"]
    plain += ["--load-format", "dummy"]
    assert given == [plain, [*plain, "--quantization", "fp8"]]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("= ")]
    assert len(lines) == 5
    assert lines[0].startswith("= tiny: ready after 1.5 s")
    assert lines[1].startswith("= tiny 8/4 x1: ") and lines[1].endswith("asked TPOT 60000: met")
    assert lines[2].startswith("= tiny 16/4 x5: ") and lines[2].endswith("asked TTFT 1e-06: MISSED")
    assert lines[4].startswith("= tiny fp8 8/4 x2: ") and "asked" not in lines[4]
    sent = json.loads((tmp_path / "serve-16-4-5.json").read_text())["config"]
    assert sent["num_requests"] == 5 and sent["vocab_size"] == 1024 - 256
    assert json.loads((tmp_path / "all.json").read_text())["results"].keys() == {"tiny", "tiny fp8"}


@pytest.mark.parametrize("given", [StubConfig(fail_every=4)], indirect=True)
def test_failed_requests_fail_their_model(
    given: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 1
    assert len(given) == 2
    assert "FAILED tiny: 8/4 x1: " in capsys.readouterr().out


@pytest.mark.parametrize("given", [StubConfig()], indirect=True)
def test_what_there_is_no_time_for_is_named(
    given: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--seconds", "5") == 1
    assert given == []
    assert "FAILED tiny fp8: not run, no time left" in capsys.readouterr().out


def test_a_card_serves_all_of_them_and_floors_are_below_what_is_asked() -> None:
    for model in MODELS:
        config = ModelConfig.from_hf(PRESETS[model.preset]).quantised_as(model.method)
        assert config.lacking_on_cuda() == []
        for load, asked in model.loads.items():
            assert load[0] + load[1] <= config.max_model_len
            floor_ms = gpu_models.floor_ms_of(config, load)
            assert floor_ms > 0 and (asked is None or floor_ms < asked[1])
