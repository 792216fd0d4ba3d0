"""Families that are not served, by rows of their own: what the description says, what is lacking.

The rows stand here and not in registry.py: a family is served when its row is there.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from pyserve.errors import ConfigError
from pyserve.model import config as config_module
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig, describe
from pyserve.model.decoder import Decoder
from pyserve.model.layer_config import LayerNames
from pyserve.model.placement import META, Placement
from pyserve.model.registry import ARCHITECTURES, Architecture
from pyserve.model.rope_config import RopeConfig
from tests.model import oracle
from tests.model.driver import Driver

PROMPT = random.Random(5).choices(range(oracle.VOCAB_SIZE), k=45)

PHI3 = Architecture(
    model_type="phi3",
    names=LayerNames(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    window="all",
    has_partial_rotary=True,
    known_keys=frozenset({"original_max_position_embeddings"}),
)
GEMMA2 = Architecture(
    model_type="gemma2",
    default_head_dim=256,
    is_tied=True,
    attention_bias="config",
    has_o_bias=True,
    window="alternate",
    names=LayerNames(
        norms_before=("input_layernorm", "pre_feedforward_layernorm"),
        norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    activation_keys=("hidden_activation",),
    activations={"gelu_pytorch_tanh": "gelu_tanh"},
    norm_offset=1.0,
    query_scale_key="query_pre_attn_scalar",
    has_softcaps=True,
    is_embedding_scaled=True,
    known_keys=frozenset(
        {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
    ),
)
PHI3_MINI: dict[str, Any] = {  # as microsoft/Phi-3-mini-4k-instruct has it
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False,
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 32064,
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


@pytest.mark.parametrize("raw", [PHI3_MINI, GEMMA2_27B], ids=["phi3", "gemma2"])
def test_families_without_a_row_are_refused_as_ever(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_hf(raw)
    supported = ", ".join(sorted(ARCHITECTURES))
    assert str(refusal.value) == (
        f"config.json: architectures must hold one of: {supported}, "
        f'got ["{raw["architectures"][0]}"]'
    )


def test_phi3_is_a_row() -> None:
    config = describe(PHI3_MINI, "Phi3ForCausalLM", PHI3)
    assert config.lacking() == [] and config.unknown_fields == ()
    assert len(config.layers) == 32 and len(set(config.layers)) == 1
    layer = config.layers[0]
    assert (layer.attention.head_dim, layer.attention.window) == (96, 2047)
    assert layer.names.qkv == ("qkv_proj",) and layer.names.gate_up == ("gate_up_proj",)
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


def test_gemma2_is_a_row_and_what_it_lacks_is_named() -> None:
    config = describe(GEMMA2_27B, "Gemma2ForCausalLM", GEMMA2)
    assert config.unknown_fields == () and config.tie_word_embeddings
    assert config.embedding_scale == math.sqrt(4608) and config.logit_softcap == 30.0
    assert [layer.attention.window for layer in config.layers[:4]] == [4096, 0, 4096, 0]
    for layer in config.layers:
        assert layer.attention.softmax_scale == 144**-0.5 and layer.attention.softcap == 50.0
        assert layer.mlp.activation == "gelu_tanh" and layer.norm.offset == 1.0
    assert config.lacking() == [
        "norms that multiply by the weight + 1",
        "attention scores capped at 50",
        "the activation gelu_tanh",
        "embeddings times 67.8823",
        "logits capped at 30",
    ]
    with pytest.raises(AssertionError, match="capped at 50"):
        build_model(config, Placement(torch.bfloat16, META), max_model_len=1)


def test_a_row_that_lacks_something_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ARCHITECTURES | {"Gemma2ForCausalLM": GEMMA2}
    monkeypatch.setattr(config_module, "ARCHITECTURES", rows)
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_hf(GEMMA2_27B)
    for word in ("config.json: Gemma2ForCausalLM", "the weight + 1", "scores capped at 50",
                 "gelu_tanh", "embeddings times 67.88", "logits capped at 30"):  # fmt: skip
        assert word in str(refusal.value)
    with pytest.raises(ConfigError, match="hidden_activation must be gelu_tanh"):
        ModelConfig.from_hf(GEMMA2_27B | {"hidden_activation": "gelu"})
    with pytest.raises(ConfigError, match="query_pre_attn_scalar must be a number"):
        ModelConfig.from_hf(GEMMA2_27B | {"query_pre_attn_scalar": 0})


def test_a_rope_table_for_each_kind_of_layer() -> None:
    row = msgspec.structs.replace(PHI3, has_ropes_by_kind=True, window="alternate")
    tables = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "tick": 1},
    }
    raw = PHI3_MINI | {"rope_theta": None, "rope_parameters": tables}
    config = describe(raw, "Phi3ForCausalLM", row)
    sliding, full = (layer.attention for layer in config.layers[:2])
    assert (sliding.window, full.window) == (2047, 0)
    plain = RopeConfig(type="default", theta=1e4, original_max_position=4096)
    assert sliding.rope == plain
    scaled = msgspec.structs.replace(plain, type="linear", theta=1e6, factor=8.0)
    assert full.rope == scaled
    assert config.unknown_fields == ("rope_parameters.sliding_attention.tick",)
    assert config.max_model_len == 4096, "what the layers with the shorter reach can"
    decoder = build_model(config, Placement(torch.float32, META), max_model_len=8)
    tables_made = [layer.attention.cos_sin for layer in decoder.layers]
    assert tables_made[0] is tables_made[2] is not tables_made[1] is tables_made[3]
    # A window that never ends changes nothing about the rotation.
    wide = describe(raw | {"sliding_window": 4096}, "Phi3ForCausalLM", row)
    assert [layer.attention.window for layer in wide.layers[:2]] == [0, 0]
    assert [layer.attention.rope for layer in wide.layers[:2]] == [plain, scaled]
    with pytest.raises(ConfigError, match="one table for all layers, not one for full_attention"):
        describe(raw, "Phi3ForCausalLM", PHI3)


@pytest.mark.parametrize("factor", [0.01, 0.55])
def test_a_rotation_of_an_odd_part_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="partial_rotary_factor must make an even number of"):
        describe(PHI3_MINI | {"partial_rotary_factor": factor, "num_attention_heads": 48,
                              "num_key_value_heads": 48}, "Phi3ForCausalLM", PHI3)  # fmt: skip


def test_a_part_that_is_said_twice_must_be_the_same() -> None:
    table = {"rope_type": "default", "partial_rotary_factor": 0.5}
    both = PHI3_MINI | {"rope_parameters": table, "partial_rotary_factor": 0.75}
    with pytest.raises(ConfigError, match="partial_rotary_factor contradicts the top level's 0.75"):
        describe(both, "Phi3ForCausalLM", PHI3)


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.5, 0.2)
    return model.eval()


def load(
    folder: Path, row: Architecture, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Decoder:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    monkeypatch.setattr(config_module, "ARCHITECTURES", {name: row})
    return oracle.load_ours(folder, **changes)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 12}, {"partial_rotary_factor": 0.5}])
def test_phi3_by_its_row_computes_what_transformers_does(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused names, a window on all layers, a rotation of half of each head."""
    torch.manual_seed(0)
    settings = oracle.TINY | {"pad_token_id": None, "sliding_window": None} | changes
    model = random_weights(Phi3ForCausalLM(Phi3Config(**settings)))
    model.save_pretrained(tmp_path)
    expected = oracle.their_logits(model, PROMPT, is_stepwise=False)
    driver = Driver(load(tmp_path, PHI3, monkeypatch))
    logits = torch.cat([driver.step({0: PROMPT[:20]}), driver.step({0: PROMPT[20:]})])
    assert oracle.relative_error(logits, expected.double()) < 1e-5


def test_norms_after_the_blocks_compute_what_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma-2 without its caps: norms of 1 + w and scaled embeddings are put into the weights."""
    torch.manual_seed(0)
    settings = oracle.TINY | {
        "head_dim": 16, "query_pre_attn_scalar": 9, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "hidden_activation": "silu", "sliding_window": 12,
        "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    model = random_weights(Gemma2ForCausalLM(Gemma2Config(**settings)))
    model.save_pretrained(tmp_path)
    expected = oracle.their_logits(model, PROMPT, is_stepwise=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] = tensors[name] + 1
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 8  # sqrt(64)
    save_file(tensors, path)
    row = msgspec.structs.replace(
        GEMMA2, norm_offset=0.0, is_embedding_scaled=False, activations={"silu": "silu"}
    )
    decoder = load(tmp_path, row, monkeypatch)
    assert [layer.attention.window for layer in decoder.config.layers] == [12, 0, 12]
    logits = Driver(decoder).step({0: PROMPT})
    assert oracle.relative_error(logits, expected.double()) < 1e-5
