"""Rotary tables against transformers' own, with the parameters of real models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pyserve.model.config import ModelConfig
from pyserve.model.layers import rotary
from pyserve.model.layers.rotary import cos_sin_table

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 512,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 128,
}
REAL_MODELS: dict[str, dict[str, Any]] = {
    "Llama-2": {"max_position_embeddings": 4096, "rope_theta": 10000.0},
    "CodeLlama": {"max_position_embeddings": 16384, "rope_theta": 1000000.0},
    "Llama-3.1": {
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Llama-3.2": {
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "deepseek-coder": {
        "max_position_embeddings": 16384,
        "rope_theta": 100000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "Qwen2.5-yarn": {
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "DeepSeek-yarn": {
        "max_position_embeddings": 163840,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
}


# Corners that no real model shows: what YaRN clamps, rounds, or cannot divide by.
YARN_CORNERS = {
    "ramp beyond the last dimension": {
        "rope_theta": 10.0, "original_max_position_embeddings": 1000,
    },
    "ramp before the first dimension": {
        "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    },
    "not on whole dimensions": {
        "rope_theta": 10000.0, "original_max_position_embeddings": 4096, "truncate": False,
    },
    "a step instead of a ramp": {
        "rope_theta": 10000.0, "original_max_position_embeddings": 4096, "truncate": False,
        "beta_fast": 4, "beta_slow": 4,
    },
}  # fmt: skip


def table_of(raw: dict[str, Any], num_rows: int | None = None) -> torch.Tensor:
    config = ModelConfig.from_hf(SHAPE | raw)
    rope = config.layers[0].attention.rope
    return cos_sin_table(rope, config.head_dim, num_rows or config.max_model_len, device=CPU)


def their_rows(raw: dict[str, Any], positions: list[int]) -> torch.Tensor:
    shape = {key: value for key, value in SHAPE.items() if key != "architectures"}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**shape, **raw))
    x = torch.zeros(1, dtype=torch.float32)
    rows = []
    for position in positions:  # one at a time: the last position sets dynamic frequencies
        cos, sin = rotary(x, torch.tensor([[position]]))
        rows.append(torch.cat([cos[0, 0, :64], sin[0, 0, :64]]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_tables_of_real_models(name: str) -> None:
    raw = REAL_MODELS[name]
    table = table_of(raw)
    assert table.dtype == torch.float32
    last = len(table) - 1
    positions = [0, 1, 2, 77, 1000, rotary.ROWS_AT_A_TIME, last // 2, last]
    positions = [position for position in positions if position <= last]
    torch.testing.assert_close(table[positions], their_rows(raw, positions), rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", YARN_CORNERS)
def test_corners_of_yarn(name: str) -> None:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": 2.0, **YARN_CORNERS[name]}
    raw = {
        "max_position_embeddings": 2 * scaling["original_max_position_embeddings"],
        "rope_theta": scaling.pop("rope_theta"),
        "rope_scaling": scaling,
    }
    table = table_of(raw)
    positions = [0, 1, 50, len(table) // 2, len(table) - 1]
    torch.testing.assert_close(table[positions], their_rows(raw, positions), rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("bound", "original"), [("high_freq_factor", 1065), ("low_freq_factor", 1000)]
)
def test_a_wavelength_on_a_bound_of_llama3_is_blended(bound: str, original: int) -> None:
    """Bit for bit: at the bound of the short wavelengths only the last place tells."""
    wavelength = float(2 * math.pi / torch.ones(1))  # of dimension 0, in float32
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 1e6, bound: original / wavelength}
    raw = {
        "max_position_embeddings": 8 * original,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": original,
            **factors,
        },
    }
    positions = [1, original, 8 * original - 1]
    assert torch.equal(table_of(raw)[positions], their_rows(raw, positions))


def test_dynamic_ntk_uses_the_frequencies_of_a_sequence_ending_at_each_row() -> None:
    raw = {
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    table = table_of(raw)
    assert len(table) == 128
    positions = list(range(128))
    torch.testing.assert_close(table, their_rows(raw, positions), rtol=0, atol=2e-5)
    plain = table_of(raw | {"rope_scaling": None})
    assert torch.equal(table[:64], plain)
    # Beyond the original context the frequencies really change.
    unscaled = table_of(raw | {"rope_scaling": None}, 128)
    assert float((table[64:] - unscaled[64:]).abs().max()) > 0.1


def test_a_table_cut_at_max_model_len_is_the_same_table() -> None:
    raw = REAL_MODELS["Llama-3.1"]
    assert torch.equal(table_of(raw, 100), table_of(raw, 9000)[:100])
