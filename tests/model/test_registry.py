"""How the families read config.json, against transformers: the same logits, or a refusal by name.

Each case is a config.json as strangers write them over a checkpoint that transformers made.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.errors import StartupError
from tests.model import oracle
from tests.model.driver import Driver

PROMPT = random.Random(3).choices(range(oracle.VOCAB_SIZE), k=40)
ABSENT = object()
WINDOW = 16

# What the checkpoint is made of: shapes that fit the defaults of the family.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"n_routed_experts": 16, "n_group": 8, "topk_group": 4},
    "glm4_moe_lite": LATENT,
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256},
    "gemma3": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": WINDOW},
    "glm4": {"head_dim": 128},
    "ministral3": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_attention_heads": 8, "num_key_value_heads": 8, "sliding_window": WINDOW},
    "phi3": {"num_key_value_heads": 4},
    "qwen2": {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 32},
    "qwen3": {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
}
FULL, SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 0.7,
    "mscale_all_dim": 0.7,
}  # fmt: skip
SAME: list[tuple[str, dict[str, Any]]] = [
    # (family, changes of config.json): both answer alike
    ("llama", {"num_key_value_heads": ABSENT}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("llama", {"hidden_act": ABSENT, "rms_norm_eps": ABSENT, "tie_word_embeddings": ABSENT}),
    ("llama", {"hidden_act": "swish", "pretraining_tp": 2, "attention_dropout": 0.5}),
    ("llama", {"attention_bias": ABSENT, "mlp_bias": ABSENT, "sliding_window": None}),
    ("llama", {"rms_norm_eps": 0.01}),
    ("llama", {"rope_parameters": ABSENT, "rope_theta": 500.0}),
    ("llama", {"rope_parameters": {}, "rope_theta": 500}),
    ("llama", {"rope_scaling": {}, "rope_parameters": LINEAR}),
    ("llama", {"rope_scaling": None, "rope_parameters": LINEAR, "rope_theta": 500.0}),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR}),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {}}),
    ("llama", {"partial_rotary_factor": None, "rope_interleaved": False, "alibi": False}),
    ("llama", {"is_causal": True, "use_cache": False, "text_config": None}),
    ("llama", {"dtype": None, "torch_dtype": "float32"}),
    ("mistral", {"num_key_value_heads": ABSENT}),
    ("mistral", {"head_dim": ABSENT}),
    ("mistral", {"use_sliding_window": False}),
    ("mistral", {"use_sliding_window": False, "max_window_layers": 2}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": ABSENT}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", {"num_key_value_heads": ABSENT, "layer_types": ABSENT}),
    ("qwen2", {"num_key_value_heads": None, "layer_types": None}),
    ("qwen2", {"sliding_window": WINDOW, "layer_types": ABSENT}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        | {"layer_types": ABSENT},
    ),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": ABSENT}
        | {"layer_types": ABSENT},
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "layer_types": ABSENT}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": FULL}),
    ("qwen3", {"head_dim": ABSENT, "num_key_value_heads": ABSENT}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING}),
    ("qwen3", {"attention_bias": ABSENT, "use_qk_norm": True}),
    ("phi3", {"num_key_value_heads": ABSENT, "rms_norm_eps": ABSENT, "sliding_window": ABSENT}),
    ("phi3", {"original_max_position_embeddings": ABSENT, "tie_word_embeddings": ABSENT}),
    ("phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5, "rope_parameters": ABSENT}),
    (
        "phi3",
        {"rope_parameters": ABSENT, "original_max_position_embeddings": 16}
        | {"rope_scaling": {"type": "yarn", "short_factor": [1] * 8, "long_factor": [2.5] * 8}},
    ),
    (
        "gemma2",
        dict.fromkeys(
            ("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "attn_logit_softcapping",
             "final_logit_softcapping", "sliding_window", "tie_word_embeddings",
             "hidden_activation", "layer_types", "rms_norm_eps"),
            ABSENT,
        ),
    ),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"sliding_window": WINDOW, "layer_types": FULL, "hidden_act": "gelu"}),
    ("gemma2", {"sliding_window": WINDOW, "layer_types": ABSENT, "attn_logit_softcapping": 1.5}),
    (
        "gemma3",
        dict.fromkeys(
            ("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "tie_word_embeddings",
             "final_logit_softcapping", "hidden_activation", "layer_types", "rope_parameters"),
            ABSENT,
        ),
    ),
    (
        "deepseek_v2",
        {"num_key_value_heads": ABSENT, "n_shared_experts": ABSENT, "head_dim": ABSENT}
        | {"routed_scaling_factor": ABSENT, "topk_method": ABSENT, "norm_topk_prob": ABSENT},
    ),
    (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 16.0, "norm_topk_prob": False, "rope_interleave": True}
        | {"rope_parameters": ABSENT, "rope_theta": 500, "rope_scaling": YARN},
    ),
    ("deepseek_v2", {"n_group": 8, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 32}),
    (
        "deepseek_v3",
        {"head_dim": ABSENT, "n_group": ABSENT, "topk_group": ABSENT, "rope_interleave": ABSENT}
        | {"routed_scaling_factor": ABSENT, "norm_topk_prob": ABSENT, "n_shared_experts": ABSENT},
    ),
    ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "num_mtp_layers": 0}),
    ("deepseek_v3", {"rope_parameters": YARN | {"rope_theta": 500.0, "mscale": 0.5}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"rope_theta": 500.0, "attention_factor": 0.8}}),
    (
        "glm4_moe_lite",
        {"routed_scaling_factor": ABSENT, "mlp_layer_types": ABSENT, "rms_norm_eps": ABSENT}
        | {"n_group": ABSENT, "topk_group": ABSENT, "norm_topk_prob": ABSENT},
    ),
    ("glm4_moe_lite", {"first_k_dense_replace": ABSENT, "rms_norm_eps": 0.01}),
    ("gemma3", {"layer_types": ABSENT, "sliding_window_pattern": 2}),
    ("gemma3", {"layer_types": MIXED, "final_logit_softcapping": 2.0}),
    (
        "gemma3",
        {"layer_types": MIXED, "rope_parameters": ABSENT, "rope_theta": 500.0}
        | {"rope_local_base_freq": 90.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    ("gemma3", {"layer_types": MIXED, "rope_parameters": {"full_attention": LINEAR}}),
    ("glm4", {"head_dim": ABSENT, "num_key_value_heads": ABSENT, "rms_norm_eps": ABSENT}),
    ("glm4", {"attention_bias": ABSENT, "partial_rotary_factor": ABSENT}),
    ("glm4", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    ("glm4", {"rope_parameters": ABSENT, "rope_theta": 500.0, "partial_rotary_factor": 0.25}),
    ("ministral3", {"head_dim": ABSENT, "num_key_value_heads": ABSENT, "rms_norm_eps": ABSENT}),
    ("ministral3", {"rope_parameters": ABSENT, "sliding_window": ABSENT}),
    (
        "ministral3",
        {
            "rope_parameters": {
                "type": "yarn", "rope_theta": 1e4, "factor": 32, "beta_fast": 32,
                "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.3,
                "max_position_embeddings": 256,
            }
        },
    ),
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # (family, changes, what the refusal names); with all of them transformers answers, or an
    # implementation of the same model does, and not as we would.
    ("llama", {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR}, "rope_type"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": LINEAR}, "rope_theta"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"is_causal": None}, "is_causal"),
    ("llama", {"num_hidden_layers": 2}, "model.layers.2"),
    ("llama", {"model_type": "mistral"}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"sliding_window": WINDOW}, "sliding_window"),
    ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("mistral", {"num_key_value_heads": 4}, "k_proj"),
    ("mistral", {"layer_types": MIXED}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("mistral", {"sliding_window": "16"}, "sliding_window"),
    ("qwen2", {"head_dim": 16}, "q_proj"),
    ("qwen2", {"layer_types": SLIDING}, "layer_types"),
    ("qwen3", {"head_dim": 64}, "q_proj"),
    ("qwen3", {"attention_bias": True}, "q_proj.bias"),
    ("phi3", {"num_key_value_heads": 2}, "qkv_proj"),
    ("phi3", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "q_proj"),
    ("phi3", {"intermediate_size": 48}, "gate_up_proj"),
    (
        "gemma2",
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
        "rope_parameters",
    ),
    ("gemma3", {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "rope_parameters"),
    ("gemma3", {"sliding_window": None}, "layer_types"),
    ("gemma3", {"rope_parameters": LINEAR}, "rope_parameters"),
    ("glm4", {"attention_bias": False}, "q_proj.bias"),
    ("glm4", {"rope_interleave": True}, "rope_interleave"),
    ("ministral3", {"sliding_window": 0}, "sliding_window"),
    ("deepseek_v2", {"q_lora_rank": None}, "q_proj"),
    ("deepseek_v2", {"kv_lora_rank": 40}, "kv_a_proj_with_mqa"),
    ("deepseek_v2", {"n_routed_experts": 7}, "mlp.experts"),
    ("deepseek_v2", {"v_head_dim": 32}, "kv_b_proj"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v3", {"attention_bias": True}, "kv_a_proj_with_mqa.bias"),
    ("deepseek_v3", {"first_k_dense_replace": 2}, "mlp"),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types"),
]


@pytest.fixture(scope="module", params=BASES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(family)
    oracle.make_model(family, **BASES[family]).save_pretrained(folder)
    return folder, (folder / "config.json").read_text()


def change(checkpoint: tuple[Path, str], changes: dict[str, Any]) -> Path:
    folder, text = checkpoint
    raw = json.loads(text) | changes
    raw = {key: value for key, value in raw.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_the_same_logits(family: str, checkpoint: tuple[Path, str]) -> None:
    for changes in (changes for name, changes in SAME if name == family):
        folder = change(checkpoint, changes)
        ours = Driver(oracle.load_ours(folder)).step({0: PROMPT})
        model = oracle.load_theirs(folder, torch.float32)
        theirs = oracle.their_logits(model, PROMPT, is_stepwise=False)
        assert oracle.relative_error(ours, theirs.double()) < 1e-5, changes


def test_or_a_refusal_by_name(family: str, checkpoint: tuple[Path, str]) -> None:
    for changes, word in ((changes, word) for name, changes, word in REFUSED if name == family):
        folder = change(checkpoint, changes)
        with pytest.raises(StartupError) as refusal:
            oracle.load_ours(folder)
        assert word in str(refusal.value), changes
