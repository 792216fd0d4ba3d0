"""What the layers of real models are, as their config.json says it; what a card lacks is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from pyserve.errors import ConfigError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.layer_config import AttentionConfig
from pyserve.model.placement import META, Placement
from pyserve.model.rope_config import RopeConfig
from tests.model.described import attention_of

PHI3_MINI: dict[str, Any] = {  # as microsoft/Phi-3-mini-4k-instruct has it
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False,
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI = PHI3_MINI | {  # as microsoft/Phi-4-mini-instruct has it
    "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    "max_position_embeddings": 131072, "num_attention_heads": 24, "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True,
    "vocab_size": 200064,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 47 + [45.0],
    },
}  # fmt: skip
GEMMA2_27B: dict[str, Any] = {  # as google/gemma-2-27b-it has it
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "head_dim": 128, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 4608,
    "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 36864,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46,
    "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}  # fmt: skip
GEMMA3_4B: dict[str, Any] = {  # as google/gemma-3-4b-it has it
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
    "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
}  # fmt: skip
MISTRAL_SMALL: dict[str, Any] = {  # as mistralai/Mistral-Small-3.1-24B-Instruct-2503 has it
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "torch_dtype": "bfloat16", "vision_feature_layer": -1,
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e9,
        "sliding_window": None, "use_cache": True, "vocab_size": 131072,
    },
    "vision_config": {"hidden_size": 1024},
}  # fmt: skip
MINISTRAL3: dict[str, Any] = {
    "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 131072,
    "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8,
    "max_position_embeddings": 262144, "dtype": "bfloat16",
}  # fmt: skip
GLM4_9B: dict[str, Any] = {  # as THUDM/GLM-4-9B-0414 has it
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": True,
    "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}  # fmt: skip
REAL = {
    "phi3-mini": PHI3_MINI, "phi4-mini": PHI4_MINI, "gemma2": GEMMA2_27B, "gemma3": GEMMA3_4B,
    "mistral-small": MISTRAL_SMALL, "ministral3": MINISTRAL3, "glm4": GLM4_9B,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_every_field_of_a_real_config_means_something(name: str) -> None:
    config = ModelConfig.from_hf(REAL[name])
    assert config.unknown_fields == () and config.dtype == "bfloat16"
    build_model(config, Placement(torch.bfloat16, META), max_model_len=1)


def test_phi3_has_fused_tensors() -> None:
    config = ModelConfig.from_hf(PHI3_MINI)
    assert len(config.layers) == 32 and len(set(config.layers)) == 1
    layer = config.layers[0]
    assert (layer.attention.head_dim, layer.attention.window) == (96, 2047)
    shapes = {
        name: destination.shape
        for name, destination in build_model(
            config, Placement(torch.bfloat16, META, tp_rank=1, tp_size=4), max_model_len=1
        )
        .destinations()
        .items()
        if name.startswith("model.layers.0.") and "proj" in name
    }
    assert shapes == {
        "model.layers.0.self_attn.qkv_proj.weight": (3 * 3072, 3072),
        "model.layers.0.self_attn.o_proj.weight": (3072, 3072),
        "model.layers.0.mlp.gate_up_proj.weight": (2 * 8192, 3072),
        "model.layers.0.mlp.down_proj.weight": (3072, 8192),
    }


def test_longrope_is_chosen_by_the_context_of_the_server() -> None:
    config = ModelConfig.from_hf(PHI4_MINI)
    rope = config.layers[0].attention.rope
    assert (rope.type, rope.original_max_position, config.max_model_len) == (
        "longrope",
        4096,
        131072,
    )
    assert rope.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    assert config.layers[0].attention.rotary_dim == 96
    assert config.choices(4096) == [
        "longrope: short_factor, as the context of 4096 tokens is not above 4096"
    ]
    (long,) = config.choices(4097)
    assert "long_factor for all prompts" in long and "--max-model-len 4096" in long
    assert ModelConfig.from_hf(PHI3_MINI).choices(4096) == []
    for name in ("su", "yarn"):  # older names of it, in this family
        old = PHI4_MINI["rope_scaling"] | {"type": name}
        assert ModelConfig.from_hf(PHI4_MINI | {"rope_scaling": old}) == config


def test_gemma2_has_its_scales_and_caps() -> None:
    config = ModelConfig.from_hf(GEMMA2_27B)
    assert config.tie_word_embeddings
    assert config.embedding_scale == math.sqrt(4608) and config.logit_softcap == 30.0
    assert [layer.attention.window for layer in config.layers[:4]] == [4096, 0, 4096, 0]
    for layer in config.layers:
        assert isinstance(layer.attention, AttentionConfig) and layer.attention.softcap == 50.0
        assert layer.attention.softmax_scale == 144**-0.5
        assert layer.mlp.activation == "gelu_tanh" and layer.norm.offset == 1.0
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    absent = {key: value for key, value in GEMMA2_27B.items() if key not in caps}
    assert ModelConfig.from_hf(absent) == config
    uncapped = ModelConfig.from_hf(GEMMA2_27B | dict.fromkeys(caps))
    assert uncapped.logit_softcap == attention_of(uncapped).softcap == 0


def test_gemma3_has_a_rope_and_a_window_for_each_kind_of_layer() -> None:
    config = ModelConfig.from_hf(GEMMA3_4B)
    assert config.architecture == "Gemma3ForCausalLM" and config.tie_word_embeddings
    assert [layer.attention.window for layer in config.layers[:6]] == [1024] * 5 + [0]
    sliding, full = attention_of(config), attention_of(config, 5)
    assert (full.num_heads, full.num_kv_heads, full.head_dim, full.has_qk_norm) == (8, 4, 256, True)
    plain = RopeConfig(type="default", theta=1e4, original_max_position=131072)
    assert sliding.rope == plain
    assert full.rope == RopeConfig(
        type="linear", theta=1e6, original_max_position=131072, factor=8.0
    )
    assert config.max_model_len == 131072, "what the layers with the shorter reach can"
    decoder = build_model(config, Placement(torch.float32, META), max_model_len=8)
    tables = [layer.attention.cos_sin for layer in decoder.layers]
    assert tables[0] is tables[1] is not tables[5] is tables[11]
    # As transformers 5 writes it.
    text = {key: value for key, value in GEMMA3_4B["text_config"].items() if key != "rope_scaling"}
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "tick": 1},
    }
    newer = ModelConfig.from_hf(GEMMA3_4B | {"text_config": text | {"rope_parameters": new}})
    assert newer.layers == config.layers
    assert newer.unknown_fields == ("rope_parameters.sliding_attention.tick",)
    # A window that never ends changes nothing about the rotation.
    wide = ModelConfig.from_hf(
        GEMMA3_4B | {"text_config": GEMMA3_4B["text_config"] | {"sliding_window": 131072}}
    )
    assert [layer.attention.window for layer in wide.layers[:6]] == [0] * 6
    assert [layer.attention.rope for layer in wide.layers[:6]] == [plain] * 5 + [full.rope]


def test_ministral3_is_scaled_where_it_is_long() -> None:
    config = ModelConfig.from_hf(MINISTRAL3)
    rope = config.layers[0].attention.rope
    assert (rope.type, rope.query_beta, rope.attention_factor) == ("yarn", 0.1, 1.0)
    assert config.max_model_len == 262144
    assert config.lacking_on_cuda() == []


def test_what_a_card_has_no_kernel_for_is_named() -> None:
    assert not any(ModelConfig.from_hf(raw).lacking_on_cuda() for raw in REAL.values())
    for head_dim, lacks in (
        (64, ["scores capped at 50 of head_dim 64"]), (80, ["head_dim 80"]), (256, []),
    ):  # fmt: skip
        config = ModelConfig.from_hf(GEMMA2_27B | {"head_dim": head_dim})
        assert config.lacking_on_cuda() == lacks


HELD_OUT: list[tuple[str, dict[str, Any], str]] = [
    # (model, one change that is not supported, what the refusal names)
    ("phi3-mini", {"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
    ("phi3-mini", {"attention_bias": True}, "attention_bias"),
    ("phi3-mini", {"hidden_act": "gelu"}, "hidden_act"),
    ("phi3-mini", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type"),
    ("phi3-mini", {"rope_scaling": {"type": "su", "long_factor": [1.0] * 48}}, "short_factor"),
    ("phi3-mini", {"num_experts": 8}, "num_experts"),
    ("phi4-mini", {"partial_rotary_factor": 1.0}, "short_factor must hold 64 numbers"),
    ("phi4-mini", {"lm_head_bias": True}, "lm_head_bias"),
    (
        "phi4-mini",
        {"rope_scaling": PHI4_MINI["rope_scaling"] | {"short_factor": [1.0, "2"]}},
        "short_factor must be a list of numbers",
    ),
    (
        "phi4-mini",
        {"rope_scaling": PHI4_MINI["rope_scaling"] | {"long_factor": [0] * 48}},
        "long_factor must be a list of numbers",
    ),
    (
        "phi4-mini",
        {"rope_scaling": PHI4_MINI["rope_scaling"] | {"short_mscale": 1.1}},
        "rope_scaling.short_mscale",
    ),
    ("phi4-mini", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation must be gelu_tanh"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"sliding_window": None, "layer_types": ["sliding_attention"] * 46}, "layer_types"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ("gemma3", {"model_type": "gemma2"}, "model_type must be gemma3_text"),
    ("gemma3", {"num_kv_shared_layers": 4}, "num_kv_shared_layers"),
    ("mistral-small", {"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta"),
    ("mistral-small", {"hidden_size": None}, "hidden_size is missing"),
    ("ministral3", {"attention_bias": True}, "attention_bias"),
    ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": "x"}}, "llama_4_scaling_beta"),
    (
        "ministral3",
        {"rope_parameters": {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
        "llama_4_scaling_beta must be 0 where rope_type is none of llama3, yarn, longrope",
    ),
    ("glm4", {"partial_rotary_factor": 0.51}, "partial_rotary_factor must make an even number of"),
    ("glm4", {"use_qk_norm": True}, "use_qk_norm"),
    ("glm4", {"n_routed_experts": 64}, "n_routed_experts"),
    (
        "glm4",
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        "q_proj is quantised",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), HELD_OUT)
def test_a_change_that_is_not_supported_is_refused_by_name(
    name: str, changes: dict[str, Any], words: str
) -> None:
    raw = json.loads(json.dumps(REAL[name]))
    raw.get("text_config", raw).update(changes)
    with pytest.raises(ConfigError, match=r"^config\.json: ") as refusal:
        build_model(ModelConfig.from_hf(raw), Placement(torch.bfloat16, META), max_model_len=1)
    assert words in str(refusal.value)


def test_what_stands_outside_of_the_text_model() -> None:
    raw = MISTRAL_SMALL | {"tie_word_embeddings": True, "my_trick": 1}
    config = ModelConfig.from_hf(raw)
    assert config.tie_word_embeddings and config.unknown_fields == ("my_trick",)
    assert not ModelConfig.from_hf(MISTRAL_SMALL).tie_word_embeddings
    for text in (None, 7):
        with pytest.raises(ConfigError, match=r"config\.json: text_config (is missing|must be an)"):
            ModelConfig.from_hf(MISTRAL_SMALL | {"text_config": text})
    with pytest.raises(ConfigError, match="model_type must be mistral3 for Mistral3ForCond"):
        ModelConfig.from_hf(MISTRAL_SMALL | {"model_type": "gemma3"})
