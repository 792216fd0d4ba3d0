"""Fields that nothing reads: refused where other implementations compute something else by them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pyserve.errors import ConfigError
from pyserve.model.config import ModelConfig
from tests.model.test_config import LLAMA, MISTRAL, QWEN2, QWEN3

HEAD_DIM = 128  # of all of them
CHANGING = [
    # (name, a value that changes the result, one that does not)
    ("qk_layernorm", True, False),
    ("use_qk_norm", True, False),
    ("alibi", True, False),
    ("use_parallel_residual", True, False),
    ("parallel_attn", True, False),
    ("rotary_pct", 0.25, 1.0),
    ("rotary_dim", 64, HEAD_DIM),
    ("rope_interleaved", True, False),
    ("rope_local_base_freq", 5e5, 1e4),
    ("attention_sinks", True, False),
    ("attention_sinks", 4, 0),
    ("attn_temperature_tuning", True, False),
    ("attn_temperature_tuning", 4, 0),
    ("llama_4_scaling_beta", 0.1, 0.0),
    ("llama_4_scaling", {"beta": 0.1}, {}),
    ("num_kv_shared_layers", 10, 0),
    ("text_config", {"hidden_size": 64}, {}),
    ("vision_config", {"hidden_size": 64}, {}),
    ("per_layer_config", {"1": {"hidden_size": 64}}, {}),
    ("quantization", {"bits": 4, "group_size": 64}, {}),
    ("load_in_8bit", True, False),
    ("is_causal", False, True),
    ("is_encoder_decoder", True, False),
    ("use_bidirectional_attention", True, False),
    ("query_pre_attn_scalar", 144, HEAD_DIM),
    ("attention_multiplier", 1.0, HEAD_DIM**-0.5),
    ("softmax_scale", 0.1, 1 / math.sqrt(HEAD_DIM)),
    ("residual_multiplier", 0.22, 1.0),
    ("dim_model_base", 256, 4096),
    ("layer_norm_eps", 1e-5, 1e-6),
    ("norm_type", "layernorm", "rmsnorm"),
    ("position_embedding_type", "alibi", "rope"),
    ("activation_function", "gelu", "silu"),
    ("num_experts", True, 1),
    ("num_loops", 4, 1),
]


@pytest.mark.parametrize(("name", "value", "neutral"), CHANGING)
@pytest.mark.parametrize("base", [LLAMA, MISTRAL, QWEN2], ids=lambda raw: raw["architectures"][0])
def test_a_value_that_is_not_neutral_is_refused_by_name(
    base: dict[str, Any], name: str, value: object, neutral: object
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {name} is .*, which changes"):
        ModelConfig.from_hf(base | {name: value})
    assert ModelConfig.from_hf(base | {name: neutral}) == ModelConfig.from_hf(base)


def test_null_is_neutral_but_where_transformers_takes_it_for_false() -> None:
    for name in {name for name, _, _ in CHANGING} - {"is_causal"}:
        assert ModelConfig.from_hf(LLAMA | {name: None}) == ModelConfig.from_hf(LLAMA)
    with pytest.raises(ConfigError, match="is_causal is null, which changes"):
        ModelConfig.from_hf(LLAMA | {"is_causal": None})


@pytest.mark.parametrize("name", ["use_qk_norm", "qk_norm", "qk_layernorm"])
def test_qwen3_has_the_norms_that_others_lack(name: str) -> None:
    assert ModelConfig.from_hf(QWEN3 | {name: True}) == ModelConfig.from_hf(QWEN3)
    with pytest.raises(ConfigError, match=f"{name} is false, which changes"):
        ModelConfig.from_hf(QWEN3 | {name: False})


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"text_config is .{80}\.\.\., which changes") as refusal:
        ModelConfig.from_hf(LLAMA | {"text_config": {"text": "x" * 10_000}})
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("base", "changes", "names"),
    [
        (LLAMA, {"my_trick": 3, "_note": "x"}, ("my_trick",)),
        # Code that comes with a checkpoint is never run: it may compute anything.
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "my.Model"}}, ("auto_map",)),
        (LLAMA, {"is_llama_config": True, "transformers.js_config": {}}, ()),
        # What a rope table has, beside it.
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "factor": 4.0, "type": "x"},
            ("factor", "type"),
        ),
        (LLAMA, {"original_max_position_embeddings": 4096}, ("original_max_position_embeddings",)),
        # Only latent attention scales its scores by it.
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 0.7}},
            ("rope_scaling.mscale_all_dim",),
        ),
        # transformers' Mistral has its window whatever these say.
        (
            MISTRAL,
            {"use_sliding_window": False, "max_window_layers": 1},
            ("max_window_layers", "use_sliding_window"),
        ),
        (QWEN2, {"use_sliding_window": False, "max_window_layers": 1}, ()),
    ],
)
def test_what_nothing_reads_is_named(
    base: dict[str, Any], changes: dict[str, Any], names: tuple[str, ...]
) -> None:
    assert ModelConfig.from_hf(base | changes).unknown_fields == names
