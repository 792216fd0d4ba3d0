"""bench.full_size with tiny models on a CPU: the same road, and faults that it must see."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import full_size, full_size_ours
from bench.full_size import Errors, judge, judge_loading, main
from pyserve.errors import PyserveError

TINY = [
    "--device", "cpu", "--no-judge-loading", "--prompt-len", "40", "--num-steps", "4",
] + [
    word
    for field in (
        "num_hidden_layers=2", "hidden_size=64", "num_attention_heads=4", "num_key_value_heads=2",
        "head_dim=16", "intermediate_size=96", "vocab_size=600",
    )
    for word in ("--set", field)
]  # fmt: skip


def test_models_pass_and_only_the_kept_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    models = ["--models", "qwen2.5-7b", "mistral-4-layers", "--keep", "qwen2.5-7b"]
    window = ["--set", "sliding_window=20"]
    code = main(["--folder", str(tmp_path / "m"), *models, *TINY, *window, "--json", str(out)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["qwen2.5-7b"]
    results = json.loads(out.read_text())["results"]
    assert results.keys() == {"qwen2.5-7b", "mistral-4-layers"}
    for result in results.values():
        assert 1 < result["logits_std"] < 4
        assert 0 < result["prompt 40"]["transformers"]["rms"] < 0.1
        assert result["4 steps"]["ours"]["rms"] > 0
        assert result["weight_bytes"] > 0 and result["anonymous_peak"] > 0
    assert printed.count(": ok") == 4


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the figures of loading do not matter, pyserve's part needs no process of its own, whose
    imports take longer than all else."""

    run_other = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[1:3] != ["-m", "bench.full_size_ours"]:
            return run_other(command, **options)
        printed, code, error = io.StringIO(), 0, ""
        try:
            with contextlib.redirect_stdout(printed):
                code = full_size_ours.main(command[3:])
        except PyserveError as failure:
            code, error = 1, str(failure)
        return subprocess.CompletedProcess(command, code, printed.getvalue(), error)

    monkeypatch.setattr("bench.full_size.subprocess.run", run)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("model", ["gemma-2-9b-2-layers", "phi-4-2-layers"])
def test_layers_that_are_not_llamas(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = ["--set", "sliding_window=20"]
    code = main(["--folder", str(tmp_path), "--models", model, *TINY, *window])
    printed = capsys.readouterr().out
    assert code == 0 and printed.count(": ok") == 2, printed


@pytest.mark.usefixtures("in_process")
def test_wrong_weights_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_theirs = full_size.load_theirs

    def changed(folder: Path, device: torch.device) -> torch.nn.Module:
        model = load_theirs(folder, device)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
        return model

    monkeypatch.setattr(full_size, "load_theirs", changed)
    assert main(["--folder", str(tmp_path), "--models", "llama-3.1-8b", *TINY]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_a_model_that_pyserve_refuses_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--models", "llama-3.1-8b", *TINY, "--set", "sliding_window=20"]
    assert main(["--folder", str(tmp_path), *flags]) == 1
    assert "sliding_window is not supported" in capsys.readouterr().out


def test_errors_are_relative_and_nan_never_passes() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 10.0]], dtype=torch.float64)
    off = exact.clone()
    off[0, 0] = 4.5
    errors = Errors.of(off, exact)
    assert errors.rms == pytest.approx(1.5 / 125**0.5) and errors.max == pytest.approx(0.15)
    assert errors.top1 == 0.5
    assert judge("x", errors, errors) and judge("x", Errors(0.2, 0.2, 1), Errors(0.1, 0.1, 1))
    assert not judge("x", Errors(0.21, 0.2, 1), Errors(0.1, 0.1, 1))
    assert not judge("x", Errors(0.1, 0.21, 1), Errors(0.1, 0.1, 1))
    assert not judge("x", Errors.of(off * torch.nan, exact), errors)


@pytest.mark.parametrize(
    ("gb_per_s", "peak", "is_good"), [(4.0, 2e8, True), (2.0, 2e8, False), (4.0, 2e9, False)]
)
def test_loading_is_judged(gb_per_s: float, peak: float, is_good: bool) -> None:
    figures = {
        "anonymous_before": 1e8, "anonymous_peak": peak, "gb_per_s": gb_per_s, "load_s": 1.0,
        "weight_bytes": 1e9, "peak_rss": 1e9, "rss_before": 1e9,
    }  # fmt: skip
    assert judge_loading("x", figures) == is_good
