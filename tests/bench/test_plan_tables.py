"""The README's tables of what fits are what the formulas say today."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import plan_tables
from pyserve.model.config import ModelConfig
from pyserve.plan.roofline import measure_model

README = Path(__file__).parents[2] / "README.md"
# In 10^9, of the models' cards.
NUM_PARAMS = {
    "Llama-3.2-3B": 3.21, "Qwen3-4B": 4.02, "Mistral-7B": 7.24, "Qwen2.5-7B": 7.62,
    "Llama-3.1-8B": 8.03, "Qwen2.5-14B": 14.77, "Qwen2.5-32B": 32.76,
    "Qwen2.5-72B": 72.71, "Llama-3.1-70B": 70.55, "CodeLlama-34B": 33.74, "Phi-4": 14.66,
    "Gemma-2-9B": 9.24, "DeepSeek-V3 FP8": 671.03, "Qwen3-30B-A3B": 30.53, "Mixtral-8x7B": 46.70,
    "DeepSeek-V2-Lite": 15.71, "GLM-4.7-Flash": 29.94,
}  # fmt: skip


def test_shapes_are_the_models() -> None:
    counted = {
        name: measure_model(ModelConfig.from_hf(raw), torch.bfloat16).num_params / 1e9
        for name, raw in plan_tables.SHAPES.items()
    }
    assert {name: round(count, 2) for name, count in counted.items()} == NUM_PARAMS


def test_the_readme_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    plan_tables.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    text = README.read_text()
    assert len(tables) == 3
    for table in tables:
        assert table in text, "print them anew: python -m bench.plan_tables"
