"""What the layers of real mixtures are, as their config.json says it; what is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from pyserve.errors import ConfigError
from pyserve.limits import MAX_EXPERTS
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.expert_schemes import DenseExperts
from pyserve.model.experts_config import ExpertsConfig
from pyserve.model.layer_config import MLPConfig
from pyserve.model.placement import META, Placement
from tests.model.described import attention_of

MIXTRAL: dict[str, Any] = {  # as mistralai/Mixtral-8x7B-Instruct-v0.1 has it
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN2_MOE: dict[str, Any] = {  # as Qwen/Qwen1.5-MoE-A2.7B-Chat has it
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "attention_dropout": 0.0,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 32768, "max_window_layers": 21,
    "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
    "norm_topk_prob": False, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {  # as Qwen/Qwen3-30B-A3B has it
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "attention_dropout": 0.0, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GLM4_MOE: dict[str, Any] = {  # as zai-org/GLM-4.5-Air has it
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "partial_rotary_factor": 0.5, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "norm_topk_prob": True,
    "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128,
    "n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
REAL = {"mixtral": MIXTRAL, "qwen2-moe": QWEN2_MOE, "qwen3-moe": QWEN3_MOE}
MIXTURES = {
    "mixtral": ExpertsConfig(size=14336, num_experts=8, top_k=2),
    "qwen2-moe": ExpertsConfig(
        size=1408, num_experts=60, top_k=4, is_normalized=False, shared_size=5632,
        has_shared_gate=True,
    ),
    "qwen3-moe": ExpertsConfig(size=768, num_experts=128, top_k=8),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_every_field_of_a_real_config_means_something(name: str) -> None:
    config = ModelConfig.from_hf(REAL[name])
    assert config.unknown_fields == ()
    assert {layer.mlp for layer in config.layers} == {MIXTURES[name]}
    assert {layer.attention.window for layer in config.layers} == {0}
    assert config.lacking_on_cuda() == []


def test_widths_that_a_card_has_no_kernels_for_are_named() -> None:
    blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for changes, lacks in (
        ({"moe_intermediate_size": 764}, ["experts of width 764, no multiple of 8"]),
        ({"hidden_size": 2052}, ["experts in a hidden_size of 2052"]),
        ({"moe_intermediate_size": 776}, []),
        (blocks, []),
        (
            blocks | {"moe_intermediate_size": 776},
            ["experts of 8-bit floats of 776 columns, no multiple of 16"],
        ),
    ):
        config = ModelConfig.from_hf(QWEN3_MOE | changes)
        assert config.lacking_on_cuda() == lacks


def test_biases() -> None:
    for raw, has_qkv, has_o in (
        (MIXTRAL, False, False), (QWEN2_MOE, True, False), (QWEN3_MOE, False, False),
        (QWEN2_MOE | {"qkv_bias": False}, False, False),
        (QWEN3_MOE | {"attention_bias": True}, True, True),
    ):  # fmt: skip
        attention = attention_of(ModelConfig.from_hf(raw))
        assert (attention.has_qkv_bias, attention.has_o_bias) == (has_qkv, has_o)


def test_layers_without_a_mixture() -> None:
    dense = MLPConfig(size=6144)
    config = ModelConfig.from_hf(
        QWEN3_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    is_dense = [layer.mlp == dense for layer in config.layers]
    assert is_dense == [True, False, True, True, True, False]
    assert config.widths == {768, 6144}
    none = QWEN3_MOE | {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}
    assert {layer.mlp for layer in ModelConfig.from_hf(none).layers} == {dense}


def test_what_is_absent_is_the_family_s() -> None:
    absent = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
              "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
              "mlp_only_layers")  # fmt: skip
    for name, raw in REAL.items():
        config = ModelConfig.from_hf({key: raw[key] for key in raw if key not in absent})
        (mixture,) = {layer.mlp for layer in config.layers}
        assert isinstance(mixture, ExpertsConfig)
        assert mixture.num_experts == MIXTURES[name].num_experts
        assert mixture.top_k == MIXTURES[name].top_k and mixture.size == MIXTURES[name].size
        assert mixture.is_normalized == (name == "mixtral")


def test_the_number_of_experts_has_two_names() -> None:
    for raw in REAL.values():
        names = {"num_experts": None, "num_local_experts": None}
        for name in names:
            config = ModelConfig.from_hf(raw | names | {name: 12})
            mixture = config.layers[0].mlp
            assert isinstance(mixture, ExpertsConfig) and mixture.num_experts == 12
            assert config.unknown_fields == ()


def test_the_first_layers_of_glm_are_dense_and_its_groups_are_read() -> None:
    config = ModelConfig.from_hf(GLM4_MOE)
    assert config.unknown_fields == () and config.has_extra_layers
    mixture = ExpertsConfig(
        size=1408, num_experts=128, top_k=8, is_sigmoid=True, has_correction_bias=True,
        shared_size=1408,
    )  # fmt: skip
    assert [layer.mlp for layer in config.layers] == [MLPConfig(size=10944)] + [mixture] * 45
    attention = attention_of(config, 1)
    assert (attention.has_qkv_bias, attention.has_o_bias, attention.has_qk_norm) == (
        True, False, False,
    )  # fmt: skip
    assert attention.rotary_dim == 64
    changes: dict[str, Any] = {
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 2,
    }
    other = ModelConfig.from_hf(GLM4_MOE | changes | {"use_qk_norm": True})
    assert attention_of(other, 1).has_qk_norm
    assert other.layers[1].mlp == replace(
        mixture, num_groups=8, top_groups=4, scale=2.5, shared_size=2816
    )
    refused: list[tuple[dict[str, Any], str]] = [
        ({"n_group": 7}, "n_group must divide the 128 experts, got 7"),
        ({"n_group": 33}, r"n_group must be an integer in \[1, 32\]"),
        ({"n_group": 8, "topk_group": 9}, r"topk_group must be an integer in \[1, 8\]"),
        ({"n_group": 32, "num_experts_per_tok": 5}, r"num_experts_per_tok must be .* \[1, 4\]"),
        ({"first_k_dense_replace": 47}, "first_k_dense_replace must be an integer"),
        ({"scoring_func": "softmax_"}, "scoring_func"),
    ]
    for changes, words in refused:
        with pytest.raises(ConfigError, match=words):
            ModelConfig.from_hf(GLM4_MOE | changes)


HELD_OUT: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_local_experts": 0}, "num_local_experts must be an integer in [1, 512]"),
    ("mixtral", {"num_local_experts": MAX_EXPERTS + 1}, "num_local_experts must be"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts must be an integer in [1, 512]"),
    ("mixtral", {"num_experts": 16}, "num_local_experts must be 16, as num_experts is, got 8"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be an integer in [1, 8]"),
    ("mixtral", {"intermediate_size": None}, "intermediate_size is missing"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("mixtral", {"moe_intermediate_size": 64}, "moe_intermediate_size"),
    ("mixtral", {"n_shared_experts": 1}, "n_shared_experts"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act must be silu"),
    ("mixtral", {"mlp_bias": True}, "mlp_bias"),
    ("mixtral", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("mixtral", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("qwen2-moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must"),
    ("qwen2-moe", {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window"),
    ("qwen3-moe", {"mlp_only_layers": [48]}, "mlp_only_layers must be a list of integers in"),
    ("qwen3-moe", {"mlp_only_layers": 0}, "mlp_only_layers must be a list of integers in [0, 47]"),
    ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
    ("qwen3-moe", {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
    ("qwen3-moe", {"moe_intermediate_size": "768"}, "moe_intermediate_size must be an integer"),
    ("qwen3-moe", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("qwen3-moe", {"topk_method": "noaux_tc"}, "topk_method"),
    ("qwen3-moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ("qwen3-moe", {"n_group": 8}, "n_group"),
    ("qwen3-moe", {"topk_group": 4}, "topk_group"),
    ("qwen3-moe", {"first_k_dense_replace": 1}, "first_k_dense_replace"),
    (
        "mixtral",
        {
            "quantization_config": {
                "quant_method": "awq", "bits": 4, "group_size": 128,
                "modules_to_not_convert": ["gate", "experts.5.w2"],
            }
        },
        "experts.0.w2 and model.layers.0.block_sparse_moe.experts.5.w2, whose matrices lie",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), HELD_OUT)
def test_a_change_that_is_not_supported_is_refused_by_name(
    name: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: ") as refusal:
        config = ModelConfig.from_hf(REAL[name] | changes)
        build_model(config, Placement(torch.bfloat16, META), max_model_len=1)
    assert words in str(refusal.value)


def test_a_rank_has_a_part_of_each_expert() -> None:
    config = ModelConfig.from_hf(QWEN2_MOE | {"num_hidden_layers": 1, "num_experts": 4})
    wholes, parts = (
        build_model(config, Placement(torch.bfloat16, META, tp_size=size), max_model_len=1)
        for size in (1, 4)
    )
    (mixture,) = parts.mixtures()
    assert isinstance(mixture.gate_up, DenseExperts) and isinstance(mixture.down, DenseExperts)
    assert mixture.gate_up.weight.shape == (4, 2 * 352, 2048)
    assert mixture.down.weight.shape == (4, 2048, 352)
    assert mixture.router.shape == (5, 2048) and not mixture.is_adding
    (whole,) = wholes.mixtures()
    assert whole.bytes_each == 4 * mixture.bytes_each == 3 * 1408 * 2048 * 2
    assert whole.params_of_whole_expert == whole.params_each == mixture.params_of_whole_expert
    shapes = {name: place.shape for name, place in wholes.destinations().items()}
    assert shapes == {name: place.shape for name, place in parts.destinations().items()}
    prefix = "model.layers.0.mlp."
    assert shapes[f"{prefix}experts.2.up_proj.weight"] == (1408, 2048)
    assert shapes[f"{prefix}experts.2.down_proj.weight"] == (2048, 1408)
    assert shapes[f"{prefix}gate.weight"] == (4, 2048)
    assert shapes[f"{prefix}shared_expert_gate.weight"] == (1, 2048)
    assert shapes[f"{prefix}shared_expert.gate_proj.weight"] == (5632, 2048)
