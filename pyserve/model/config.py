"""ModelConfig: what config.json says about a model, every field typed and checked.

Reads the names of transformers 4 and 5. What the decoder cannot compute is refused by name: a wrong
answer is worse than an error. Keys that change no result are not looked at; those that nobody here
knows are kept by name. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from pyserve.errors import CheckpointError, ConfigError
from pyserve.limits import HEAD_DIM_STEP, MAX_GROUP, MAX_HEAD_DIM, MAX_VOCAB_SIZE
from pyserve.model.fields import Fields
from pyserve.model.registry import ARCHITECTURES, QUANT_METHODS, Architecture
from pyserve.model.rope_config import RopeConfig, rope_from_fields
from pyserve.model.unknown_fields import Model, unknown_fields
from pyserve.model_files import guarded, read_object

CheckpointDtype = Literal["float32", "bfloat16", "float16"]

MAX_CONFIG_BYTES = 16 * 2**20
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_WIDTH = 2**22  # hidden_size, intermediate_size
MAX_CONTEXT = 2**24  # positions are int32 and the rope table has one row each
DEFAULT_WINDOW = 4096  # of transformers, where sliding_window is absent
DEFAULT_MAX_WINDOW_LAYERS = 28  # likewise


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only model.

    max_model_len    tokens the model supports, what its rope scaling adds included.
    qkv_bias, o_bias, mlp_bias, qk_norm
                     which optional parameters the layers have.
    windows          sliding window of each layer: a token sees this many, itself included; 0: all.
    dtype            of the checkpoint, as config.json says; transformers' default is float32.
    unknown_fields   of config.json, not used.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_model_len: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    dtype: CheckpointDtype
    unknown_fields: tuple[str, ...] = ()

    @classmethod
    def from_path(cls, folder: Path) -> ModelConfig:
        """Reads config.json. Raises CheckpointError where it is no JSON, else as from_hf."""
        return cls.from_hf(read_config(folder))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the contents of config.json. Raises ConfigError naming the key, value and limit."""
        with guarded("config.json"):
            return cls._from_hf(raw)

    @classmethod
    def _from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        fields = Fields(raw, "config.json")
        name = _architecture_name(fields)
        architecture = ARCHITECTURES[name]
        _refuse_unsupported(fields)
        num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
        num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        num_kv_heads = _num_kv_heads(fields, architecture, num_heads)
        head_dim = _head_dim(fields, architecture, hidden_size, num_heads)
        max_position = fields.integer("max_position_embeddings", 1, MAX_CONTEXT)
        rope, max_model_len = rope_from_fields(fields, max_position)
        if max_model_len > MAX_CONTEXT:
            raise ConfigError(
                f"config.json: rope scaling extends the context to {max_model_len} tokens, "
                f"the limit is {MAX_CONTEXT}"
            )
        rms_norm_eps = fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6)
        model = Model(
            architecture=name,
            window=architecture.window,
            rope_type=rope.type,
            values={
                "head_dim": head_dim,
                "hidden_size": hidden_size,
                "rms_norm_eps": rms_norm_eps,
                "rope_theta": rope.theta,
                "softmax_scale": head_dim**-0.5,
            },
        )
        qkv_bias = _bias(fields, "attention_bias", name, architecture.attention_bias)
        return cls(
            architecture=name,
            vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB_SIZE),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=rms_norm_eps,
            rope=rope,
            max_model_len=max_model_len,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            qkv_bias=qkv_bias,
            o_bias=qkv_bias and architecture.has_o_bias,
            mlp_bias=_bias(fields, "mlp_bias", name, architecture.mlp_bias),
            qk_norm=architecture.qk_norm,
            windows=_windows(fields, architecture, num_layers, max_model_len),
            dtype=_dtype(fields),
            unknown_fields=unknown_fields(raw, model),
        )


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds. Raises CheckpointError where it is no JSON object."""
    path = folder / "config.json"
    raw = read_object(path, MAX_CONFIG_BYTES)
    if raw is None:
        raise CheckpointError(f"{path}: No such file or directory")
    return raw


def _architecture_name(fields: Fields) -> str:
    supported = ", ".join(sorted(ARCHITECTURES))
    if not fields.has("architectures"):
        raise ConfigError(f"config.json: architectures is missing; supported are: {supported}")
    names = fields.strings("architectures")
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise fields.refuse("architectures", f"must hold one of: {supported}")
    model_type = ARCHITECTURES[names[0]].model_type
    if fields.string("model_type", default=model_type) != model_type:
        raise fields.refuse("model_type", f"must be {model_type} for {names[0]}")
    return names[0]


def _refuse_unsupported(fields: Fields) -> None:
    for key in ("quantization_config", "compression_config"):
        if fields.has(key) and fields.quant_method(key) not in QUANT_METHODS:
            raise fields.refuse(key, "is not supported: no quantised checkpoints yet")
    for key in ("hidden_act", "hidden_activation"):
        if fields.string(key, default="silu") not in ("silu", "swish"):
            raise fields.refuse(key, "must be silu")


def _num_kv_heads(fields: Fields, architecture: Architecture, num_heads: int) -> int:
    key = "num_key_value_heads"
    default = num_heads if fields.is_null(key) else architecture.default_kv_heads or num_heads
    num_kv_heads = fields.integer(key, 1, MAX_HEADS, default=default, nullable=True)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: {key} must divide num_attention_heads ({num_heads}), got "
            f"{num_kv_heads}{'' if fields.has(key) else ', the default of the family'}"
        )
    if num_heads // num_kv_heads > MAX_GROUP:
        raise fields.refuse(key, f"must be at least {-(-num_heads // MAX_GROUP)} here")
    return num_kv_heads


def _head_dim(fields: Fields, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    default = architecture.default_head_dim
    if not fields.has("head_dim") and default is None:
        if hidden_size % num_heads:
            raise fields.refuse("num_attention_heads", f"must divide hidden_size ({hidden_size})")
        default = hidden_size // num_heads
    nullable = architecture.default_head_dim is None
    head_dim = fields.integer("head_dim", 1, MAX_WIDTH, default=default, nullable=nullable)
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"config.json: head_dim (or hidden_size / num_attention_heads) must be a multiple of "
            f"{HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    return head_dim


def _bias(
    fields: Fields, key: str, architecture_name: str, rule: Literal["config", "always", "never"]
) -> bool:
    if rule == "config":
        return fields.boolean(key, default=False)
    has_bias = rule == "always"
    if fields.boolean(key, default=has_bias) != has_bias:
        raise fields.refuse(key, f"is not supported for {architecture_name}")
    return has_bias


def _windows(
    fields: Fields, architecture: Architecture, num_layers: int, max_model_len: int
) -> tuple[int, ...]:
    """The sliding window of each layer, from a rule of the family or from `layer_types`."""
    window = _window(fields, architecture, max_model_len)
    first = 0
    if architecture.window == "upper":
        first = fields.integer(
            "max_window_layers", 0, MAX_CONTEXT, default=DEFAULT_MAX_WINDOW_LAYERS
        )
    windows = tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not fields.has("layer_types"):
        return windows
    types = fields.strings("layer_types")
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise fields.refuse(
            "layer_types", f"must be {num_layers} of full_attention and sliding_attention"
        )
    typed = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    if "sliding_attention" in types and not window:
        raise fields.refuse("layer_types", "names sliding_attention but there is no sliding_window")
    # transformers reads layer_types for the Qwen families only; elsewhere it must change nothing.
    if architecture.window != "upper" and typed != windows:
        raise fields.refuse("layer_types", "contradicts sliding_window")
    return typed


def _window(fields: Fields, architecture: Architecture, max_model_len: int) -> int:
    if architecture.window != "all":  # transformers' Mistral does not look at it
        is_used = fields.boolean("use_sliding_window", default=architecture.window == "none")
        if not is_used:
            return 0
    if fields.is_null("sliding_window"):
        return 0
    if architecture.window == "none" and not fields.has("sliding_window"):
        return 0
    window = fields.integer("sliding_window", 1, MAX_CONTEXT, default=DEFAULT_WINDOW)
    if window >= max_model_len:
        return 0
    if architecture.window == "none":
        raise fields.refuse("sliding_window", "is not supported for this architecture")
    return window


def _dtype(fields: Fields) -> CheckpointDtype:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    dtype = fields.string(key, default="float32", nullable=True).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise fields.refuse(key, "must be float32, bfloat16 or float16")
    return cast(CheckpointDtype, dtype)
