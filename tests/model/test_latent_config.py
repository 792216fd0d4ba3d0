"""What the layers of real models with latent attention are, as their config.json says it; what is
refused, by name; what is kept of a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyserve.errors import ConfigError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.experts_config import ExpertsConfig
from pyserve.model.latent_config import LatentConfig
from pyserve.model.layer_config import MLPConfig
from pyserve.model.layers.latent_attention import num_tiles
from pyserve.model.placement import META, Placement

V2_LITE: dict[str, Any] = {  # as deepseek-ai/DeepSeek-V2-Lite-Chat has it
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V3: dict[str, Any] = V2_LITE | {  # as deepseek-ai/DeepSeek-R1 has it, in bfloat16
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "rope_scaling": V2_LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip
GLM_FLASH: dict[str, Any] = {  # as zai-org/GLM-4.7-Flash has it
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite",
    "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 20, "num_experts_per_tok": 4,
    "num_hidden_layers": 47, "num_key_value_heads": 20, "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
REAL = {"v2-lite": V2_LITE, "v3": V3, "glm-flash": GLM_FLASH}
MIXTURES = {
    "v2-lite": (
        1, ExpertsConfig(
            size=1408, num_experts=64, top_k=6, is_normalized=False, shared_size=2816
        ),
    ),
    "v3": (
        3, ExpertsConfig(
            size=2048, num_experts=256, top_k=8, is_sigmoid=True, scale=2.5, num_groups=8,
            top_groups=4, has_correction_bias=True, shared_size=2048,
        ),
    ),
    "glm-flash": (
        1, ExpertsConfig(
            size=1536, num_experts=64, top_k=4, is_sigmoid=True, scale=1.8,
            has_correction_bias=True, shared_size=1536,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_every_field_of_a_real_config_means_something(name: str) -> None:
    raw, (num_dense, mixture) = REAL[name], MIXTURES[name]
    config = ModelConfig.from_hf(raw)
    assert config.unknown_fields == () and config.dtype == "bfloat16"
    assert config.max_model_len == raw["max_position_embeddings"]
    assert config.has_extra_layers == (name != "v2-lite")
    dense = MLPConfig(size=raw["intermediate_size"])
    num_sparse = raw["num_hidden_layers"] - num_dense
    assert [layer.mlp for layer in config.layers] == [dense] * num_dense + [mixture] * num_sparse
    assert config.lacking_on_cuda() == []


def test_the_scale_of_the_scores_has_yarn_s_part_and_cosines_have_not() -> None:
    scales = {"v2-lite": 0.114721, "v3": 0.135234, "glm-flash": 1 / 16}
    for name, scale in scales.items():
        attention = ModelConfig.from_hf(REAL[name]).layers[0].attention
        assert isinstance(attention, LatentConfig) and attention.has_pairs
        assert attention.softmax_scale == pytest.approx(scale, rel=1e-5)
        assert attention.rope.attention_factor == 1.0
    half = V3 | {"rope_scaling": V3["rope_scaling"] | {"mscale": None}}
    attention = ModelConfig.from_hf(half).layers[0].attention
    assert attention.softmax_scale == pytest.approx(scales["v3"], rel=1e-5)
    assert attention.rope.attention_factor == pytest.approx(1.36888, rel=1e-5)
    without = V3 | {"rope_scaling": V3["rope_scaling"] | {"mscale_all_dim": None}}
    assert ModelConfig.from_hf(without).layers[0].attention.softmax_scale == 192**-0.5


def test_what_is_absent_is_the_family_s() -> None:
    absent = ("head_dim", "num_key_value_heads", "rope_interleave", "n_shared_experts",
              "routed_scaling_factor", "norm_topk_prob", "topk_method", "scoring_func")  # fmt: skip
    for name, raw in REAL.items():
        config = ModelConfig.from_hf({key: raw[key] for key in raw if key not in absent})
        assert config == ModelConfig.from_hf(raw), name
    named = {"head_dim": 64, "qk_head_dim": 192, "rope_interleave": True}
    assert ModelConfig.from_hf(V3 | named) == ModelConfig.from_hf(V3)
    types = ["dense"] * 2 + ["sparse"] * 45
    other = {key: GLM_FLASH[key] for key in GLM_FLASH if key != "first_k_dense_replace"}
    layers = ModelConfig.from_hf(other | {"mlp_layer_types": types}).layers
    assert [isinstance(layer.mlp, ExpertsConfig) for layer in layers] == [False] * 2 + [True] * 45


def test_groups_limit_the_choice_where_the_method_says_so() -> None:
    raw = V2_LITE | {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    for method, groups in (("greedy", (1, 1)), ("group_limited_greedy", (8, 3))):
        mixture = ModelConfig.from_hf(raw | {"topk_method": method}).layers[1].mlp
        assert isinstance(mixture, ExpertsConfig) and mixture.scale == 16.0
        assert (mixture.num_groups, mixture.top_groups) == groups


def test_what_is_kept_of_a_token() -> None:
    for name, num_bytes in (("v2-lite", 27 * 1152), ("v3", 61 * 1152), ("glm-flash", 47 * 1152)):
        model = build_model(
            ModelConfig.from_hf(REAL[name]), Placement(torch.bfloat16, META, tp_size=4),
            max_model_len=1,
        )  # fmt: skip
        specs = model.kv_specs()
        assert sum(spec.bytes_per_block(1) for spec in specs) == num_bytes
        assert [tensor.token_shape for tensor in specs[0].tensors] == [(576,)]
    assert [num_tiles(num_heads) for num_heads in (1, 16, 20, 32, 40, 128)] == [1, 1, 2, 2, 4, 8]


def test_the_tensors_of_a_layer() -> None:
    def shapes(raw: dict[str, Any], tp_size: int = 1) -> dict[str, tuple[int, ...]]:
        placement = Placement(torch.bfloat16, META, tp_size=tp_size)
        model = build_model(ModelConfig.from_hf(raw), placement, max_model_len=1)
        prefix = "model.layers.0.self_attn."
        return {
            name.removeprefix(prefix): place.shape
            for name, place in model.destinations().items()
            if name.startswith(prefix)
        }

    shared = {
        "kv_a_proj_with_mqa.weight": (576, 2048),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (16 * 256, 512),
        "o_proj.weight": (2048, 2048),
    }
    assert shapes(V2_LITE) == shared | {"q_proj.weight": (16 * 192, 2048)}
    assert shapes(V2_LITE, 4) == shapes(V2_LITE)
    biases = {"kv_a_proj_with_mqa.bias": (576,), "o_proj.bias": (2048,)}
    assert shapes(V2_LITE | {"attention_bias": True}) == shapes(V2_LITE) | biases
    queries = {
        "q_a_proj.weight": (768, 2048),
        "q_a_layernorm.weight": (768,),
        "q_b_proj.weight": (16 * 192, 768),
    }
    assert shapes(V2_LITE | {"q_lora_rank": 768}) == shared | queries


def test_what_a_card_has_no_kernel_for_is_named() -> None:
    for changes, lacks in (
        ({}, []),
        ({"kv_lora_rank": 256}, ["kv_lora_rank 256 with qk_rope_head_dim 64"]),
        ({"qk_nope_head_dim": 100}, ["qk_nope_head_dim 100"]),
    ):
        config = ModelConfig.from_hf(V2_LITE | {"first_k_dense_replace": 27} | changes)
        assert config.lacking_on_cuda() == lacks


HELD_OUT: list[tuple[str, dict[str, Any], str]] = [
    # (model, one change that is not supported, what the refusal names)
    ("v2-lite", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ("v2-lite", {"kv_lora_rank": 500}, "kv_lora_rank must be a multiple of 8, got 500"),
    ("v2-lite", {"kv_lora_rank": 4096}, "kv_lora_rank must be an integer in [8, 1024]"),
    ("v2-lite", {"qk_nope_head_dim": None}, "qk_nope_head_dim is missing"),
    ("v2-lite", {"qk_rope_head_dim": "64"}, "qk_rope_head_dim must be an integer"),
    ("v2-lite", {"v_head_dim": 0}, "v_head_dim must be an integer"),
    ("v2-lite", {"num_key_value_heads": 4}, "num_key_value_heads must be num_attention_heads (16)"),
    ("v2-lite", {"topk_method": "noaux_tc"}, "topk_method must be greedy or group_limited_greedy"),
    (
        "v2-lite",
        {"topk_method": "group_limited_greedy", "n_group": 5},
        "n_group must divide the 64 experts, got 5",
    ),
    ("v2-lite", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("v2-lite", {"rope_interleave": False}, "rope_interleave"),
    ("v2-lite", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("v2-lite", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("v2-lite", {"mlp_bias": True}, "mlp_bias"),
    ("v2-lite", {"sliding_window": 4096}, "sliding_window"),
    ("v2-lite", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("v3", {"q_lora_rank": 0}, "q_lora_rank must be an integer"),
    ("v3", {"n_group": 7}, "n_group must divide the 256 experts, got 7"),
    ("v3", {"topk_group": 9}, "topk_group must be an integer in [1, 8]"),
    ("v3", {"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ("v3", {"topk_method": "greedy"}, "topk_method"),
    ("v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("v3", {"head_dim": 128}, "head_dim must be qk_rope_head_dim (64)"),
    ("v3", {"qk_head_dim": 128}, "qk_head_dim must be 192"),
    ("v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("v3", {"rope_scaling": V3["rope_scaling"] | {"type": "ntk"}}, "type must be one of"),
    (  # transformers scales the scores by it with any type but default
        "v3",
        {"rope_scaling": {"type": "linear", "factor": 4.0, "mscale_all_dim": 0.7}},
        "rope_scaling.mscale_all_dim is 0.7, which changes",
    ),
    ("v3", {"rope_parameters": V2_LITE["rope_scaling"]}, "mscale_all_dim is"),
    ("glm-flash", {"mlp_layer_types": ["dense"] * 47}, "contradicts first_k_dense_replace"),
    ("glm-flash", {"mlp_layer_types": ["moe"] * 47}, "mlp_layer_types must be 47 of dense and"),
    ("glm-flash", {"use_qk_norm": True}, "use_qk_norm"),
    ("glm-flash", {"layer_types": ["sliding_attention"] * 47}, "layer_types"),
]


@pytest.mark.parametrize(("name", "changes", "words"), HELD_OUT)
def test_a_change_that_is_not_supported_is_refused_by_name(
    name: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: ") as refusal:
        ModelConfig.from_hf(REAL[name] | changes)
    assert words in str(refusal.value)
