"""config.json: old and new names, what is refused, and agreement with transformers' reading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyserve.config import DEMO_MODEL
from pyserve.errors import CheckpointError, ConfigError
from pyserve.model.config import ModelConfig
from pyserve.model.layer_config import AttentionConfig, LayerConfig, MLPConfig, NormConfig
from pyserve.model.rope_config import RopeConfig
from pyserve.model_files import MAX_OBJECT_BYTES
from tests.model import oracle

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32016,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 16384,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_codellama_with_the_names_of_its_time() -> None:
    config = ModelConfig.from_hf(
        LLAMA
        | {
            "_name_or_path": "somewhere",
            "bos_token_id": 1,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "num_key_value_heads": 32,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.32.0.dev0",
            "use_cache": True,
            "attention_dropout": 0.1,
        }
    )
    norm = NormConfig(eps=1e-5)
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rope=RopeConfig(type="default", theta=1e6, original_max_position=16384),
            softmax_scale=128**-0.5,
            window=0,
            has_qkv_bias=False,
            has_o_bias=False,
            has_qk_norm=False,
        ),
        mlp=MLPConfig(size=11008, activation="silu", has_bias=False),
        norm=norm,
    )
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32016,
        hidden_size=4096,
        layers=(layer,) * 32,
        final_norm=norm,
        max_model_len=16384,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("name", oracle.CASES)
def test_both_generations_of_names_mean_the_same(name: str, tmp_path: Path) -> None:
    case = oracle.CASES[name]
    oracle.make_model(case.family, **case.changes).config.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    new["architectures"] = [oracle.FAMILIES[case.family][1].__name__]
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    scaling = dict(new["rope_parameters"])
    if (local := scaling.pop("sliding_attention", None)) is not None:
        old["rope_local_base_freq"] = local["rope_theta"]
        scaling = scaling["full_attention"]
    old["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    old["rope_scaling"] = None if scaling == {"type": "default"} else scaling
    assert "rope_theta" not in new
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (MISTRAL | {"sliding_window": None}, (0, 0)),
        (MISTRAL | {"sliding_window": 4096}, (4096, 4096)),
        (MISTRAL, (4096, 4096)),  # transformers' default
        (MISTRAL | {"sliding_window": 16384}, (0, 0)),  # never ends within the context
        # As transformers, whose Mistral does not look at the flag.
        (MISTRAL | {"sliding_window": 4096, "use_sliding_window": False}, (4096, 4096)),
        (LLAMA | {"num_hidden_layers": 1, "sliding_window": 8, "use_sliding_window": False}, (0,)),
        (QWEN2 | {"sliding_window": 4096, "max_window_layers": 2}, (0, 0, 0, 0)),
        (
            QWEN2 | {"sliding_window": 512, "max_window_layers": 3, "use_sliding_window": True},
            (0, 0, 0, 512),
        ),
        (
            QWEN3
            | {
                "sliding_window": 512,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (512, 0, 512, 0),
        ),
        (LLAMA | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, (0,)),
    ],
)
def test_windows(raw: dict[str, Any], windows: tuple[int, ...]) -> None:
    layers = ModelConfig.from_hf(raw).layers
    assert tuple(layer.attention.window for layer in layers) == windows


@pytest.mark.parametrize(
    ("raw", "biases"),
    [
        (LLAMA, (False, False, False)),
        (LLAMA | {"attention_bias": True}, (True, True, False)),
        (LLAMA | {"mlp_bias": True}, (False, False, True)),
        (QWEN2, (True, False, False)),
        (QWEN3 | {"attention_bias": True}, (True, True, False)),
        (MISTRAL | {"attention_bias": False}, (False, False, False)),
    ],
)
def test_biases(raw: dict[str, Any], biases: tuple[bool, bool, bool]) -> None:
    for layer in ModelConfig.from_hf(raw).layers:
        attention = layer.attention
        assert isinstance(attention, AttentionConfig) and isinstance(layer.mlp, MLPConfig)
        assert (attention.has_qkv_bias, attention.has_o_bias, layer.mlp.has_bias) == biases


@pytest.mark.parametrize(
    ("changes", "rope_type", "max_model_len"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear", 65536),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic", 32768),
        ({"rope_scaling": LLAMA3_ROPE}, "llama3", 16384),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 16.0,
                    "original_max_position_embeddings": 4096,
                    "finetuned": True,
                }
            },
            "yarn",
            65536,
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn", 65536),
        ({"rope_parameters": {"rope_theta": 5e5}}, "default", 16384),
        ({"rope_scaling": {"rope_type": "default"}}, "default", 16384),
    ],
)
def test_rope_and_the_context_it_gives(
    changes: dict[str, Any], rope_type: str, max_model_len: int
) -> None:
    config = ModelConfig.from_hf(LLAMA | changes)
    rope = config.layers[0].attention.rope
    assert (rope.type, config.max_model_len) == (rope_type, max_model_len)


def rope_of(raw: dict[str, Any]) -> RopeConfig:
    return ModelConfig.from_hf(raw).layers[0].attention.rope


def test_rope_theta_stands_inside_or_at_the_top_level() -> None:
    for raw in (
        LLAMA | {"rope_theta": 5e5},
        LLAMA | {"rope_parameters": {"rope_theta": 5e5}},
        LLAMA | {"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5}},
        LLAMA | {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
    ):
        assert rope_of(raw).theta == 5e5
    assert rope_of(LLAMA).theta == 1e4


def test_qwen3_has_its_own_head_dim() -> None:
    assert ModelConfig.from_hf(QWEN3 | {"hidden_size": 1024}).head_dim == 128
    assert ModelConfig.from_hf(QWEN3 | {"head_dim": 64}).head_dim == 64


def test_kv_heads_that_are_absent_are_the_familys_and_null_is_all_heads() -> None:
    key = "num_key_value_heads"
    for base, default in ((LLAMA, 32), (MISTRAL, 8), (QWEN2, 32), (QWEN3, 32)):
        assert ModelConfig.from_hf(base).num_kv_heads == default
        assert ModelConfig.from_hf(base | {key: None}).num_kv_heads == 32
        assert ModelConfig.from_hf(base | {key: 4}).num_kv_heads == 4


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype(key: str, name: str) -> None:
    assert ModelConfig.from_hf(LLAMA | {key: name}).dtype == name.removeprefix("torch.")
    assert ModelConfig.from_hf(LLAMA).dtype == "float32"


REFUSED = [
    # (base, changes, what the message must name)
    (LLAMA, {"architectures": ["FalconForCausalLM"]}, ["FalconForCausalLM", "LlamaForCausalLM"]),
    (LLAMA, {"architectures": None}, ["architectures", "Qwen3ForCausalLM"]),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
    (LLAMA, {"architectures": []}, ["architectures"]),
    (LLAMA, {"vocab_size": None}, ["vocab_size", "missing"]),
    (LLAMA, {"vocab_size": "32000"}, ["vocab_size", "integer"]),
    (LLAMA, {"vocab_size": 2**40}, ["vocab_size", str(2**40), str(2**19)]),
    (LLAMA, {"vocab_size": True}, ["vocab_size"]),
    (LLAMA, {"num_hidden_layers": 0}, ["num_hidden_layers"]),
    (LLAMA, {"num_hidden_layers": 10**30}, ["num_hidden_layers"]),
    (LLAMA, {"hidden_size": -1}, ["hidden_size"]),
    (LLAMA, {"hidden_size": 4096.0}, ["hidden_size"]),
    (LLAMA, {"num_key_value_heads": 5}, ["num_key_value_heads", "divide"]),
    (LLAMA, {"num_key_value_heads": 64}, ["num_key_value_heads"]),
    (QWEN2, {"num_attention_heads": 16}, ["num_key_value_heads", "16", "32", "default"]),
    (LLAMA, {"model_type": "mistral"}, ["model_type", "mistral", "llama", "LlamaForCausalLM"]),
    (QWEN3, {"model_type": "qwen2"}, ["model_type", "qwen2", "qwen3"]),
    (LLAMA, {"model_type": 3}, ["model_type", "string"]),
    (LLAMA, {"rms_norm_eps": None}, ["rms_norm_eps", "null"]),
    (LLAMA, {"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "1e-5"]),
    (LLAMA, {"hidden_act": None}, ["hidden_act", "null"]),
    (LLAMA, {"hidden_activation": "gelu_pytorch_tanh"}, ["hidden_activation", "silu"]),
    (QWEN3, {"head_dim": None}, ["head_dim", "null"]),
    (QWEN2, {"max_window_layers": None}, ["max_window_layers", "null"]),
    (LLAMA, {"attention_bias": "true"}, ["attention_bias", "true"]),
    (LLAMA, {"num_attention_heads": 31}, ["num_attention_heads", "4096"]),
    (LLAMA, {"head_dim": 100}, ["head_dim", "multiple of 8"]),
    (LLAMA, {"head_dim": 512}, ["head_dim", "256"]),
    (LLAMA, {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    (LLAMA, {"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
    (LLAMA, {"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
    (LLAMA, {"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn"]),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "bits"]),
    (LLAMA, {"quantization_config": {"quant_method": "fp6"}}, ["quant_method", "awq", '"fp6"']),
    (LLAMA, {"quantization_config": "awq"}, ["quantization_config", "object"]),
    (LLAMA, {"max_position_embeddings": 0}, ["max_position_embeddings"]),
    (LLAMA, {"sliding_window": 4096}, ["sliding_window"]),
    (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    (LLAMA, {"rope_theta": 0}, ["rope_theta"]),
    (LLAMA, {"rope_scaling": "linear"}, ["rope_scaling"]),
    (LLAMA, {"rope_scaling": {"factor": 2.0}}, ["rope_type"]),
    (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, ["type", '"su"', "yarn"]),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, ["short_factor", "missing"]),
    (LLAMA, {"rope_scaling": {"rope_type": "proportional"}}, ["proportional", "longrope"]),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor", "missing"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 60000}}, ["context", "983040000"]),
    (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, ["high_freq_factor"]),
    (
        LLAMA,
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}},
        ["beta_fast"],
    ),
    (
        QWEN3,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["rope_parameters", "full_attention"],
    ),
    (MISTRAL, {"attention_bias": True}, ["attention_bias", "MistralForCausalLM"]),
    (QWEN2, {"attention_bias": False}, ["attention_bias", "Qwen2ForCausalLM"]),
    (QWEN2, {"mlp_bias": True}, ["mlp_bias", "Qwen2ForCausalLM"]),
    (MISTRAL, {"sliding_window": -4}, ["sliding_window", "-4"]),
    (MISTRAL, {"layer_types": ["full_attention"] * 2}, ["layer_types", "sliding_window"]),
    (QWEN2, {"layer_types": ["sliding_attention"] * 4}, ["layer_types", "sliding_window"]),
    (QWEN2, {"layer_types": ["full_attention"] * 3}, ["layer_types", "4"]),
    (QWEN2, {"layer_types": ["linear_attention"] * 4}, ["layer_types", "linear_attention"]),
]


@pytest.mark.parametrize(("base", "changes", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_served_is_refused_by_name(
    base: dict[str, Any], changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_hf(base | changes)
    for word in named:
        assert word in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"a": NAN}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b"12",
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": "\\ud800"}',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_file_that_is_no_config(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="config.json"):
        ModelConfig.from_path(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize(
    "field",
    ["rms_norm_eps", "rope_theta", "hidden_size", "num_hidden_layers", "vocab_size", "head_dim",
     "max_position_embeddings", "partial_rotary_factor"],
)  # fmt: skip
def test_numbers_that_overflow_are_refused_by_field(
    field: str, number: str, tmp_path: Path
) -> None:
    text = json.dumps(LLAMA | {field: "@"}).replace('"@"', number)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json: {field} ") as refusal:
        ModelConfig.from_path(tmp_path)
    assert len(str(refusal.value)) < 400


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert ModelConfig.from_path(tmp_path) == ModelConfig.from_hf(LLAMA)


def test_a_missing_or_huge_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json: No such file"):
        ModelConfig.from_path(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_OBJECT_BYTES + 1)
    with pytest.raises(CheckpointError, match="the limit is"):
        ModelConfig.from_path(tmp_path)


def test_reading_a_config_needs_no_torch() -> None:
    script = "import sys, pyserve.model.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_fields_are_named_and_changing_ones_refused() -> None:
    raw = json.loads((DEMO_MODEL / "config.json").read_text())
    assert ModelConfig.from_hf(raw).unknown_fields == ()
    odd = raw | {"my_trick": 3, "_note": "x", "num_experts": 1, "logit_scale": 1.0}
    assert ModelConfig.from_hf(odd).unknown_fields == ("my_trick",)
    for name, value in (("logit_scale", 0.0625), ("num_experts", 8), ("clip_qkv", 8.0)):
        with pytest.raises(ConfigError, match=f"{name} is {value}, which changes"):
            ModelConfig.from_hf(raw | {name: value})
