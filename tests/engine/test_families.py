"""The engine on what the families differ in: the same tokens alone and in any company.

Windows are crossed, ropes of each kind are long, queries are scaled from the second block on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.destination import finish_loading
from pyserve.model.placement import Placement
from tests.engine.test_runner import assert_near_tie, generate, make_engine
from tests.engine.tiny import CONFIG

GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 9, "sliding_window": 20}
FACTORS = [1.0 + i / 4 for i in range(6)]
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 24, "head_dim": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": LATENT
    | {
        "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "rope_scaling": {
            "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "DeepseekV3ForCausalLM": LATENT | {"n_group": 4, "topk_group": 2},
    "Glm4MoeLiteForCausalLM": LATENT | {"attention_bias": True},
    "Phi3ForCausalLM": {
        "sliding_window": 30,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "su", "short_factor": FACTORS, "long_factor": [3 * it for it in FACTORS]
        },
    },
    "Ministral3ForCausalLM": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
        "max_position_embeddings": 256,
    },
    "Gemma2ForCausalLM": GEMMA
    | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 20.0, "num_hidden_layers": 3},
    "Gemma3ForCausalLM": GEMMA | {"sliding_window_pattern": 2},
    "Glm4ForCausalLM": {"attention_bias": True},
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_group": 4,
        "topk_group": 2, "partial_rotary_factor": 0.5, "attention_bias": True,
    },
    "MixtralForCausalLM": {"num_local_experts": 5, "sliding_window": 30},
    "Qwen2MoeForCausalLM": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
    },
    "Qwen3MoeForCausalLM": {
        "num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}  # fmt: skip
SETTINGS: list[dict[str, int]] = [
    {"budget": 8},  # chunks of one
    {"num_blocks": 17, "budget": 11, "caching": True},  # preemption and prefix hits, too
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tokens(name: str) -> None:
    raw = CONFIG | {"architectures": [name]} | FAMILIES[name]
    if "rope_parameters" in raw or name == "Gemma3ForCausalLM":
        del raw["rope_theta"]
    config = ModelConfig.from_hf(raw)
    decoder = build_model(config, Placement(torch.float32, torch.device("cpu")))
    destinations = decoder.destinations()
    generator = torch.Generator().manual_seed(5)
    for place in destinations.values():
        for part in place.parts:
            noise = torch.randn(part.view.shape, generator=generator)
            is_norm = part.view.dim() == 1 and bool(place.dummy_mean or config.final_norm.offset)
            part.view.copy_(place.dummy_mean + 0.1 * noise if is_norm else 0.35 * noise)
    finish_loading(destinations.values())
    expected = generate(make_engine(decoder), alone=True)
    assert len(set(expected[0].output)) > 10, "a model that repeats itself shows little"
    for settings in SETTINGS:
        engine = make_engine(decoder, **settings)  # type: ignore[arg-type]
        readers = generate(engine, depth=1)
        assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in settings)
        assert (engine.scheduler.num_cached_tokens > 0) == ("caching" in settings)
        for reader, other in zip(readers, expected, strict=True):
            if reader.output != other.output:
                assert reader.params.temperature == 0.0, "sampled differently"
                assert_near_tie(decoder, reader, other)
