"""Tiny random checkpoints made by transformers, and what transformers computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

from bench import full_size
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement

logging.disable_progress_bar()

VOCAB_SIZE = 211
FAMILIES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "glm4": (Glm4Config, Glm4ForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
# Large initial weights: attention and rotation must matter, or a wrong one would not be seen.
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """One row of the oracle: a family and what is special in its config."""

    family: str
    changes: dict[str, Any]
    # Dynamic NTK is defined by decoding: see layers/rotary.py.
    is_stepwise: bool = False


def rope(kind: str, **values: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **values}
    return {"rope_parameters": parameters}


def longrope(original: int) -> dict[str, Any]:
    factors = [1.0 + i / 4 for i in range(6)]
    table = rope("longrope", short_factor=factors, long_factor=[3 * it for it in factors])
    table["rope_parameters"]["partial_rotary_factor"] = 0.75
    return table | {"original_max_position_embeddings": original}


LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 40, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 20, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
YARN_OF_V2 = rope(
    "yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707
)


CASES = {
    "llama": Case("llama", {"tie_word_embeddings": False}),
    "llama-mha-theta": Case("llama", {"num_key_value_heads": 4, **rope("default", rope_theta=1e6)}),
    "llama-bias": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-head64": Case("llama", {"tie_word_embeddings": True, "head_dim": 64}),
    "llama-llama3": Case(
        "llama",
        {
            "head_dim": 32,
            **rope(
                "llama3",
                rope_theta=500_000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "llama-linear": Case("llama", rope("linear", factor=4.0)),
    "llama-dynamic": Case(
        "llama", {"max_position_embeddings": 40, **rope("dynamic", factor=4.0)}, is_stepwise=True
    ),
    "llama-yarn": Case("llama", {**rope("yarn", factor=4.0, original_max_position_embeddings=64)}),
    "llama-yarn-mscale": Case(
        "llama",
        rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            mscale=1.0,
            mscale_all_dim=0.7,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "llama-yarn-attention-factor": Case(
        "llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=32, attention_factor=0.9),
    ),
    "mistral-head128": Case("mistral", {"sliding_window": None, "head_dim": 128}),
    "mistral-window": Case("mistral", {"sliding_window": 20, "num_attention_heads": 8}),
    "qwen2": Case("qwen2", {}),
    "qwen2-tied-gqa4": Case("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-window": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}
    ),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3-head128-tied": Case("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "qwen3-bias-window": Case(
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3-head96-window": Case(
        "phi3", {"hidden_size": 192, "num_attention_heads": 2, "sliding_window": 20}
    ),
    "phi3-partial-short": Case("phi3", {"tie_word_embeddings": True, **longrope(256)}),
    "phi3-long": Case("phi3", longrope(16)),
    "ministral3": Case(
        "ministral3",
        {
            "head_dim": 32,
            "max_position_embeddings": 128,
            **rope(
                "yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0,
                mscale_all_dim=1.0, llama_4_scaling_beta=0.4,
            ),
        },
    ),
    "gemma2": Case(
        "gemma2",
        # Caps that are reached: scores and logits of random weights are small.
        {
            "head_dim": 32, "query_pre_attn_scalar": 9, "sliding_window": 20,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "hidden_size": 72,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2-head256": Case(
        "gemma2", {"head_dim": 256, "sliding_window": 256, "tie_word_embeddings": False}
    ),
    "gemma3": Case(
        "gemma3",
        {
            "head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 12,
            "num_hidden_layers": 6, "initializer_range": 0.1,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "glm4": Case("glm4", {"head_dim": 32, "attention_bias": True}),
    "glm4-moe": Case(
        "glm4_moe",
        {
            "head_dim": 32, "attention_bias": True, "n_routed_experts": 8, "n_group": 4,
            "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2,
            "routed_scaling_factor": 1.5, "moe_intermediate_size": 32, "use_qk_norm": True,
        },
    ),
    "glm4-moe-plain": Case(
        "glm4_moe",
        {
            "head_dim": 16, "n_routed_experts": 6, "num_experts_per_tok": 2,
            "norm_topk_prob": False, "moe_intermediate_size": 40, "first_k_dense_replace": 2,
        },
    ),
    "deepseek-v2-lite": Case("deepseek_v2", {**LATENT, "q_lora_rank": None, **YARN_OF_V2}),
    "deepseek-v2-groups": Case(
        "deepseek_v2",
        LATENT
        | {
            "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 3.0, "first_k_dense_replace": 0, "attention_bias": True,
        },
    ),
    "deepseek-v3": Case(
        "deepseek_v3",
        LATENT
        | rope(
            "yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0,
            mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0,
        )
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "deepseek-v3-halves": Case(
        "deepseek_v3", LATENT | {"n_group": 1, "topk_group": 1, "rope_interleave": False}
    ),
    "glm4-moe-lite": Case(
        "glm4_moe_lite",
        LATENT
        | {
            "qk_nope_head_dim": 24, "v_head_dim": 32, "num_attention_heads": 5,
            "num_key_value_heads": 5, "n_routed_experts": 6, "mlp_layer_types": None,
        },
    ),
    "mixtral": Case("mixtral", {"num_local_experts": 5}),
    "mixtral-window-top1": Case(
        "mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 20}
    ),
    "qwen2-moe": Case(
        "qwen2_moe",
        {
            "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 72, "mlp_only_layers": [1],
        },
    ),
    "qwen2-moe-normalized": Case(
        "qwen2_moe",
        {
            "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 33,
            "shared_expert_intermediate_size": 17, "norm_topk_prob": True, "qkv_bias": False,
        },
    ),
    "qwen3-moe": Case(
        "qwen3_moe",
        {
            "num_experts": 10, "num_experts_per_tok": 4, "moe_intermediate_size": 40,
            "norm_topk_prob": True, "head_dim": 32, "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3-moe-plain": Case(
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16},
    ),
}  # fmt: skip


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model; norm weights and biases are random too."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0 if family.startswith("gemma") else 1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif name.endswith("gate.weight"):  # of a router, or of a shared expert
                parameter.normal_(0.0, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    return model


def load_ours(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    return load_model(
        folder,
        msgspec.structs.replace(ModelConfig.from_path(folder), **changes),
        Placement(dtype, torch.device("cpu")),
        load_format="auto",
        seed=0,
        progress=lambda done, total: None,
    )


def load_theirs(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers; at float64 everything but the rotary tables is computed in it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    model.set_experts_implementation("eager")  # others take no float64, nor every size
    if dtype == torch.float64:
        for module in model.modules():
            name = type(module).__name__
            if name.startswith("Gemma") and name.endswith("RMSNorm"):
                module.forward = _ExactNorm(1 + module.weight, module.eps)
            elif name.endswith("RMSNorm"):
                module.forward = _ExactNorm(module.weight, module.variance_epsilon)
    return model


class _ExactNorm:
    """RMSNorm without the cast to float32 that transformers' has."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return (
            self.weight.to(x.device) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        )


def their_logits(model: PreTrainedModel, prompt: list[int], *, is_stepwise: bool) -> Tensor:
    """[len(prompt), vocab_size], of the whole prompt at once or of token after token."""
    return full_size.their_logits(model, prompt, 1 if is_stepwise else len(prompt))


def their_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def relative_error(logits: Tensor, exact: Tensor) -> float:
    """||logits - exact|| / ||exact||"""
    return float((logits.double() - exact).norm() / exact.norm())
