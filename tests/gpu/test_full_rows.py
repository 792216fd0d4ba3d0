"""As test_full_model.py, with the other dense rows.

Phi-3 (heads of 96), Phi-4-mini (of which 96 of 128 are turned, longrope), Gemma 2 (heads of 256 and
of 128, capped scores and logits, windows), Gemma 3, GLM-4-0414, Ministral 3 (scaled queries).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.test_full_model import SETTINGS, Checkpoint, assert_ratio
from tests.gpu.test_run_ahead import assert_replays
from tests.model.oracle import rope

FACTORS = [1.0 + i / 4 for i in range(48)]
LONGROPE = rope("longrope", short_factor=FACTORS, long_factor=[3 * it for it in FACTORS])
LONGROPE["rope_parameters"]["partial_rotary_factor"] = 0.75
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"hidden_size": 192, "num_attention_heads": 2, "sliding_window": 20}),
    # Sequences here are longer than 16 tokens: transformers, too, takes long_factor.
    "phi4-mini": (
        "phi3",
        {
            "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
            "original_max_position_embeddings": 16, "tie_word_embeddings": True, **LONGROPE,
        },
    ),
    # Caps that are reached: scores and logits of random weights are small.
    "gemma2": (
        "gemma2",
        {
            "head_dim": 256, "query_pre_attn_scalar": 70, "sliding_window": 20,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "hidden_size": 72,
            "initializer_range": 0.1, "tie_word_embeddings": False,
        },
    ),
    "gemma2-head128": (
        "gemma2",
        {
            "head_dim": 128, "query_pre_attn_scalar": 40, "sliding_window": 20,
            "attn_logit_softcapping": 2.0, "initializer_range": 0.1,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 12,
            "num_hidden_layers": 6, "initializer_range": 0.1,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "glm4": ("glm4", {"head_dim": 128, "attention_bias": True, "num_key_value_heads": 1}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 64,
            **rope(
                "yarn", factor=16.0, original_max_position_embeddings=16, mscale=1.0,
                mscale_all_dim=1.0, llama_4_scaling_beta=0.4,
            ),
        },
    ),
}  # fmt: skip
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
