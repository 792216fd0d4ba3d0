"""As test_full_model.py, with mixtures of experts. Those with latent attention: test_latent.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.test_full_model import SETTINGS, Checkpoint, assert_ratio
from tests.gpu.test_run_ahead import assert_replays
from tests.model.oracle import CASES

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (CASES[name].family, CASES[name].changes | changes)
    for name, changes in {
        "mixtral": {"head_dim": 128},
        "mixtral-window-top1": {"head_dim": 64},
        # An expert that takes every token, behind a gate; a layer with a plain MLP.
        "qwen2-moe": {"hidden_size": 256},
        "qwen3-moe": {"head_dim": 128},
        "qwen3-moe-plain": {"head_dim": 64},
        # Groups of experts, sigmoids, a bias for the choice.
        "glm4-moe": {"head_dim": 128},
    }.items()
}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=MODELS)
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Checkpoint]:
    model = MODELS[request.param]
    return [Checkpoint.made(tmp_path_factory.mktemp("model"), model, dtype) for dtype in DTYPES]


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_of_bfloat16(settings: str, checkpoints: list[Checkpoint]) -> None:
    assert_ratio(checkpoints[0], settings)


def test_logits_of_float16(checkpoints: list[Checkpoint]) -> None:
    assert_ratio(checkpoints[1], "all")


def test_replays_and_running_ahead_give_the_same_tokens(checkpoints: list[Checkpoint]) -> None:
    assert_replays(checkpoints[0].ours)
