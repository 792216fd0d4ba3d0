"""bench.gpu_adapters with a tiny model on a CPU: real servers, which load what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu_adapters
from bench.gpu_adapters import LONG_PROMPT, MANY_USERS, NUM_ADAPTERS, ON_AWQ, ONE_USER, QUESTIONS
from pyserve.model.adapter_weights import read_adapter
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import META, Placement
from tests.engine.tiny import CONFIG

ASKED = [question for question in QUESTIONS if question.names][:2]  # one adapter, and all
# Answers of more tokens than one frame holds: of those in one there is no time between tokens.
SMALL = {ONE_USER: (8, 24, 1), MANY_USERS: (8, 24, 9), LONG_PROMPT: (40, 2, 1)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_adapters, "PRESET", "tiny")
    monkeypatch.setattr(gpu_adapters, "NUM_REQUESTS", {load: load[2] for load in SMALL.values()})
    monkeypatch.setattr(gpu_adapters, "LONG_PROMPT", SMALL[LONG_PROMPT])
    smaller = [replace(question, load=SMALL[question.load]) for question in ASKED]
    monkeypatch.setattr(gpu_adapters, "QUESTIONS", smaller)
    monkeypatch.setattr(gpu_adapters, "ON_AWQ", replace(ON_AWQ, load=SMALL[ON_AWQ.load]))


def run(tmp_path: Path, *flags: str) -> int:
    folders = ["--folder", str(tmp_path), "--out", str(tmp_path)]
    return gpu_adapters.main([*folders, "--json", str(tmp_path / "all.json"), "--", *flags])


@pytest.mark.usefixtures("tiny")
def test_a_line_for_each_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--device", "cpu", "--load-format", "dummy", "--max-num-seqs", "16") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("= ")]
    assert len(lines) == 3 + len(ASKED) + 1
    for question in (*ASKED, ON_AWQ):
        (line,) = [line for line in lines if line.startswith(f"= {question.text}: ")]
        assert f"% (asked <= {question.limit_percent:g}): " in line
    figures = json.loads((tmp_path / "all.json").read_text())["ms"]
    assert len(figures) == 2 * len(ASKED) + 2 and all(ms > 0 for ms in figures.values())
    sent = json.loads((tmp_path / "serve-8-24-1.json").read_text())["config"]
    assert sent["models"] == ["a0"]
    sent = json.loads((tmp_path / "serve-8-24-9.json").read_text())["config"]
    assert sent["models"] == [f"a{number}" for number in range(NUM_ADAPTERS)]


@pytest.mark.usefixtures("tiny")
def test_a_server_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--device", "cpu", "--load-format", "dummy", "--no-such-flag") == 1
    assert "FAILED the server ended with exit code" in capsys.readouterr().out


def test_an_adapter_of_all_matrices_of_the_layers(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(CONFIG)
    folder = gpu_adapters.write_adapter(tmp_path / "adapter", config)
    placement = Placement(torch.bfloat16, META, num_adapter_slots=1, max_adapter_rank=16)
    targets = build_model(config, placement, max_model_len=1).adapter_targets()
    weights = read_adapter(folder, targets, max_rank=16, dtype=torch.bfloat16)
    assert weights.pairs.keys() == targets.keys() and weights.largest == 16
    assert len(targets) == 7 * len(config.layers)
