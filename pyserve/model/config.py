"""ModelConfig: what config.json says about a model, every field typed and checked.

The keys of transformers 4 and 5 are read as the family's row of registry.py says. What the decoder
cannot compute is refused by name: a wrong answer is worse than an error. Keys that cannot change a
result are ignored; the names of unknown keys are kept for a warning. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from pyserve.config import Use
from pyserve.errors import CheckpointError, ConfigError
from pyserve.limits import EXPERTS_STEP, HEAD_DIM_STEP, MAX_GROUP, MAX_HEAD_DIM, MAX_VOCAB_SIZE
from pyserve.model.experts_config import ExpertsConfig, experts_from_fields
from pyserve.model.fields import Fields
from pyserve.model.latent_config import LatentConfig, latent_from_fields, rope_dim
from pyserve.model.layer_config import (
    LAYER_KINDS,
    Activation,
    AttentionConfig,
    LayerConfig,
    LayerKind,
    MLPConfig,
    NormConfig,
)
from pyserve.model.pooling import Pooling, base_architecture, read_pooling
from pyserve.model.quantization import KEYS as QUANTIZATION_KEYS
from pyserve.model.quantization import Method, Quantization, agreed, read_quantization
from pyserve.model.registry import ARCHITECTURES, MULTIMODAL, Architecture, Multimodal
from pyserve.model.rope_config import RopeConfig, rope_from_fields
from pyserve.model.unknown_fields import Model, unknown_fields, unknown_outside_of_text
from pyserve.model_files import guarded, read_object

CheckpointDtype = Literal["float32", "bfloat16", "float16"]

MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_WIDTH = 2**22  # hidden_size, intermediate_size
MAX_CONTEXT = 2**24  # positions are int32 and the rope table has one row each
DEFAULT_MAX_WINDOW_LAYERS = 28  # transformers' default of max_window_layers
DEFAULT_WINDOW_PATTERN = 6  # transformers' default of sliding_window_pattern
# Keys of a multimodal config.json that apply to the text model although not in its text_config.
OUTER_KEYS = ("dtype", "torch_dtype", "tie_word_embeddings", *QUANTIZATION_KEYS)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only model.

    final_norm       the norm after the last layer.
    max_model_len    tokens of context that the model supports, including its rope scaling.
    embedding_scale  factor of the embeddings.
    logit_softcap    logits are softcap * tanh(logit / softcap); 0: no cap.
    dtype            of the checkpoint, as config.json says; transformers' default is float32.
    quantization     how the matrices are quantised; None: they are plain numbers.
    pooling          what the model computes of a text if it pools; None: it generates.
    towers           modules beside the text model in the checkpoint, which are not loaded.
    has_extra_layers the checkpoint may hold further layers, which are not loaded.
    unknown_fields   names of keys in config.json that are not known here.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig
    max_model_len: int
    tie_word_embeddings: bool
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
    dtype: CheckpointDtype
    quantization: Quantization | None = None
    pooling: Pooling | None = None
    towers: tuple[str, ...] = ()
    has_extra_layers: bool = False
    unknown_fields: tuple[str, ...] = ()

    @classmethod
    def from_path(cls, folder: Path, *, use: Use = "auto") -> ModelConfig:
        """Read config.json in `folder`, and the files beside it that describe pooling.

        use  what the model is served for; "auto": as its files say.

        Raises CheckpointError if a file is no JSON; otherwise as from_hf.
        """
        return cls.from_hf(read_config(folder), folder=folder, use=use)

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], *, folder: Path | None = None, use: Use = "auto"
    ) -> ModelConfig:
        """Read the contents of config.json. Raises ConfigError naming the key, value and limit."""
        with guarded("config.json"):
            fields = Fields(raw, "config.json")
            name = _architecture_name(fields)
            if name in MULTIMODAL:
                config = _describe_text(raw, fields, MULTIMODAL[name])
            else:
                config = describe(raw, name, ARCHITECTURES[name])
            pooling = read_pooling(raw, folder, use, hidden_size=config.hidden_size)
            return config._pooled_by(pooling)

    @property
    def num_heads(self) -> int:
        """The maximum over the layers; num_kv_heads and head_dim below are maxima too."""
        return max(layer.attention.num_heads for layer in self.layers)

    @property
    def num_kv_heads(self) -> int:
        return max(layer.attention.num_kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        return max(layer.attention.head_dim for layer in self.layers)

    @property
    def widths(self) -> frozenset[int]:
        """The inner widths of all layers' MLPs and experts."""
        return frozenset(width for layer in self.layers for width in layer.mlp.widths)

    @property
    def model_type(self) -> str:
        """transformers' name of the text model's family."""
        return ARCHITECTURES[self.architecture].model_type

    def quantised_as(self, method: Method | None) -> ModelConfig:
        """This config as served with --quantization `method`. Raises ConfigError on a conflict."""
        return msgspec.structs.replace(self, quantization=agreed(self.quantization, method))

    def answering_by(self, answer_ids: tuple[int, ...]) -> ModelConfig:
        """This config with the ids of pooling.answers, where a score is made of these tokens."""
        if self.pooling is None or not self.pooling.answers or not answer_ids:
            return self
        assert len(answer_ids) == len(self.pooling.answers)
        return self._pooled_by(msgspec.structs.replace(self.pooling, answer_ids=answer_ids))

    def _pooled_by(self, pooling: Pooling | None) -> ModelConfig:
        for token_id in pooling.answer_ids if pooling is not None else ():
            if token_id >= self.vocab_size:
                raise ConfigError(
                    f"the token {token_id}, whose logit makes the score, is not among the "
                    f"{self.vocab_size} of vocab_size"
                )
        return msgspec.structs.replace(self, pooling=pooling)

    def lacking_on_cuda(self) -> list[str]:
        """Descriptions of what the model needs and our CUDA kernels do not support; [] if none."""
        lacks = [text for layer in self.layers for text in layer.lacking_on_cuda()]
        sizes = [it.mlp.size for it in self.layers if isinstance(it.mlp, ExpertsConfig)]
        widths = frozenset((self.hidden_size, *sizes)) if sizes else frozenset()
        if sizes and self.hidden_size % EXPERTS_STEP:
            lacks.append(f"experts in a hidden_size of {self.hidden_size}")
        if self.quantization is not None:
            lacks += self.quantization.lacking_on_cuda(widths)
        return list(dict.fromkeys(lacks))

    def choices(self, max_model_len: int) -> list[str]:
        """Lines for the log: choices that max_model_len decides for all requests (longrope)."""
        said = dict.fromkeys(layer.attention.rope.choice(max_model_len) for layer in self.layers)
        return [text for text in said if text is not None]


def _describe_text(raw: Mapping[str, Any], fields: Fields, row: Multimodal) -> ModelConfig:
    """Describe the text model of a multimodal config.json."""
    inner = fields.table("text_config")
    model_type = inner.string("model_type", default=row.text_types[0])
    if model_type not in row.text_types:
        raise inner.refuse("model_type", f"must be {' or '.join(row.text_types)}")
    name = next(name for name, row in ARCHITECTURES.items() if row.model_type == model_type)
    text = {key: raw[key] for key in OUTER_KEYS if key in raw}
    text = {**raw["text_config"], **text}
    config = describe(text, name, ARCHITECTURES[name])
    unknown = {*config.unknown_fields, *unknown_outside_of_text(raw, row)}
    return msgspec.structs.replace(config, towers=row.towers, unknown_fields=tuple(sorted(unknown)))


def describe(raw: Mapping[str, Any], name: str, architecture: Architecture) -> ModelConfig:
    """Describe the model of config.json `raw`, read by its architecture's row of registry.py.

    Raises ConfigError naming the key, the value and the limit.
    """
    fields = Fields({**architecture.defaults, **raw}, "config.json")
    quantization = read_quantization(fields)
    activation = _activation(fields, architecture)
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    layers, max_model_len = _layers(fields, name, architecture, hidden_size, activation)
    first = layers[0].attention
    model = Model(
        architecture=architecture,
        rope_types=frozenset(layer.attention.rope.type for layer in layers),
        values={
            "head_dim": first.head_dim,
            "hidden_size": hidden_size,
            "rms_norm_eps": layers[0].norm.eps,
            "rope_theta": first.rope.theta,
            "softmax_scale": first.softmax_scale,
        },
    )
    return ModelConfig(
        architecture=name,
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        layers=layers,
        final_norm=layers[0].norm,
        max_model_len=max_model_len,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        embedding_scale=hidden_size**0.5 if architecture.is_embedding_scaled else 1.0,
        logit_softcap=_softcap(fields, architecture, "final_logit_softcapping"),
        dtype=_dtype(fields),
        quantization=quantization,
        has_extra_layers=architecture.has_extra_layers,
        unknown_fields=unknown_fields(raw, model),
    )


def _layers(
    fields: Fields, name: str, architecture: Architecture, hidden_size: int, activation: Activation
) -> tuple[tuple[LayerConfig, ...], int]:
    """Describe the layers; also returns the tokens of context that their rope supports."""
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    norm = NormConfig(
        eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6), offset=architecture.norm_offset
    )
    has_bias = _bias(fields, architecture.attention_bias_key, name, architecture.attention_bias)
    head_dim = (
        rope_dim(fields)
        if architecture.is_latent
        else _head_dim(fields, architecture, hidden_size, num_heads)
    )
    ropes, max_model_len = _ropes(fields, architecture, head_dim)
    mlps = _mlps(fields, name, architecture, num_layers, activation)
    window, kinds = _layer_kinds(fields, architecture, num_layers, max_model_len)
    attentions: Mapping[LayerKind, AttentionConfig | LatentConfig]
    if architecture.is_latent:
        pairs_key, has_pairs = architecture.pairs_key, architecture.has_pairs
        if pairs_key is not None:
            has_pairs = fields.boolean(pairs_key, default=True)
        rope = ropes["full_attention"]
        latent = latent_from_fields(
            fields, num_heads, rope, has_bias=has_bias, has_pairs=has_pairs
        )  # fmt: skip
        attentions = dict.fromkeys(LAYER_KINDS, latent)
    else:
        attentions = _attentions(
            fields, architecture, ropes, num_heads=num_heads, head_dim=head_dim, window=window,
            has_bias=has_bias,
        )  # fmt: skip
    layers = tuple(
        LayerConfig(attention=attentions[kind], mlp=mlp, norm=norm, names=architecture.names)
        for kind, mlp in zip(kinds, mlps, strict=True)
    )
    return layers, max_model_len


def _attentions(
    fields: Fields, architecture: Architecture, ropes: Mapping[LayerKind, RopeConfig], *,
    num_heads: int, head_dim: int, window: int, has_bias: bool,
) -> dict[LayerKind, AttentionConfig]:  # fmt: skip
    """The attention of each kind of layer."""
    num_kv_heads = _num_kv_heads(fields, architecture, num_heads)
    query_scale = float(head_dim)
    if architecture.query_scale_key is not None:
        query_scale = fields.number(architecture.query_scale_key, 1e-3, 1e6, default=query_scale)
    return {
        kind: AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=ropes[kind],
            softmax_scale=query_scale**-0.5,
            softcap=_softcap(fields, architecture, "attn_logit_softcapping"),
            window=window if kind == "sliding_attention" else 0,
            has_qkv_bias=has_bias,
            has_o_bias=has_bias and architecture.has_o_bias,
            has_qk_norm=_has_qk_norm(fields, architecture),
            has_pairs=architecture.has_pairs,
        )
        for kind in LAYER_KINDS
    }


def _mlps(
    fields: Fields, name: str, architecture: Architecture, num_layers: int, activation: Activation
) -> list[MLPConfig | ExpertsConfig]:
    """The MLP of each layer."""
    has_bias = _bias(fields, "mlp_bias", name, architecture.mlp_bias)
    dense = MLPConfig(
        size=fields.integer("intermediate_size", 1, MAX_WIDTH),
        activation=activation,
        has_bias=has_bias,
    )
    if architecture.experts is None:
        return [dense] * num_layers
    return [
        mixture or dense
        for mixture in experts_from_fields(fields, architecture.experts, num_layers)
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json in `folder`. Raises CheckpointError if it is missing or no JSON object."""
    path = folder / "config.json"
    raw = read_object(path)
    if raw is None:
        raise CheckpointError(f"{path}: No such file or directory")
    return raw


def _architecture_name(fields: Fields) -> str:
    rows: dict[str, Architecture | Multimodal] = {**ARCHITECTURES, **MULTIMODAL}
    supported = ", ".join(sorted(rows))
    if not fields.has("architectures"):
        raise ConfigError(f"config.json: architectures is missing; supported are: {supported}")
    names = [base_architecture(name) for name in fields.strings("architectures")]
    if len(names) != 1 or names[0] not in rows:
        raise fields.refuse("architectures", f"must hold one of: {supported}")
    model_type = rows[names[0]].model_type
    if fields.string("model_type", default=model_type) != model_type:
        raise fields.refuse("model_type", f"must be {model_type} for {names[0]}")
    return names[0]


def _activation(fields: Fields, architecture: Architecture) -> Activation:
    activations = architecture.activations
    activation = next(iter(activations.values()))
    for key in architecture.activation_keys:
        name = fields.string(key, default=next(iter(activations)))
        if name not in activations:
            raise fields.refuse(key, f"must be {' or '.join(dict.fromkeys(activations.values()))}")
        activation = activations[name]
    return activation


def _ropes(
    fields: Fields, architecture: Architecture, head_dim: int
) -> tuple[dict[LayerKind, RopeConfig], int]:
    """The rotary embedding of each kind of layer, and the tokens of context that all support."""
    max_position = fields.integer("max_position_embeddings", 1, MAX_CONTEXT)
    ropes, lens = {}, []
    for kind in LAYER_KINDS:
        ropes[kind], max_model_len = rope_from_fields(
            fields,
            max_position,
            architecture.rope,
            is_windowed=kind == "sliding_attention",
        )
        if max_model_len > MAX_CONTEXT:
            raise ConfigError(
                f"config.json: rope scaling extends the context to {max_model_len} tokens, "
                f"the limit is {MAX_CONTEXT}"
            )
        lens.append(max_model_len)
        rotary_dim = int(head_dim * ropes[kind].partial_rotary_factor)
        if rotary_dim % 2 or not rotary_dim:
            raise ConfigError(
                f"config.json: partial_rotary_factor must make an even number of the {head_dim} "
                f"dimensions of a head, it makes {rotary_dim}"
            )
        for key in ("short_factor", "long_factor"):
            num_factors = len(getattr(ropes[kind], f"{key}s"))
            if ropes[kind].type == "longrope" and num_factors != rotary_dim // 2:
                raise ConfigError(
                    f"config.json: {key} must hold {rotary_dim // 2} numbers, one for each pair of "
                    f"dimensions that are rotated, it holds {num_factors}"
                )
    return ropes, min(lens)


def _has_qk_norm(fields: Fields, architecture: Architecture) -> bool:
    if architecture.qk_norm_key is None:
        return architecture.has_qk_norm
    return fields.boolean(architecture.qk_norm_key, default=False)


def _softcap(fields: Fields, architecture: Architecture, key: str) -> float:
    if key not in architecture.softcap_keys or not fields.has(key):
        return 0.0
    return fields.number(key, 1e-3, 1e6)


def _num_kv_heads(fields: Fields, architecture: Architecture, num_heads: int) -> int:
    key = "num_key_value_heads"
    num_kv_heads = fields.integer(key, 1, MAX_HEADS, default=num_heads, is_nullable=True)
    if num_heads % num_kv_heads:
        is_default = architecture.defaults.get(key) == num_kv_heads
        raise ConfigError(
            f"config.json: {key} must divide num_attention_heads ({num_heads}), got "
            f"{num_kv_heads}{', the default of the family' if is_default else ''}"
        )
    if num_heads // num_kv_heads > MAX_GROUP:
        raise fields.refuse(key, f"must be at least {-(-num_heads // MAX_GROUP)} here")
    return num_kv_heads


def _head_dim(fields: Fields, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    default: Any = architecture.defaults.get("head_dim")
    is_nullable = default is None
    if not fields.has("head_dim") and is_nullable:
        if hidden_size % num_heads:
            raise fields.refuse("num_attention_heads", f"must divide hidden_size ({hidden_size})")
        default = hidden_size // num_heads
    head_dim = fields.integer("head_dim", 1, MAX_WIDTH, default=default, is_nullable=is_nullable)
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


def _layer_kinds(
    fields: Fields, architecture: Architecture, num_layers: int, max_model_len: int
) -> tuple[int, tuple[LayerKind, ...]]:
    """The sliding window, and the kind of each layer, by the family's rule or `layer_types`.

    The window is 0 (none) where it is at least max_model_len and so has no effect.
    """
    said = _window(fields, architecture, max_model_len)
    window = said if said < max_model_len else 0
    first, every = 0, 0
    if architecture.window == "none":
        first = num_layers
    elif architecture.window == "upper":
        first = fields.integer(
            "max_window_layers", 0, MAX_CONTEXT, default=DEFAULT_MAX_WINDOW_LAYERS
        )
    elif architecture.window == "alternate":
        every = 2
    elif architecture.window == "pattern":
        every = fields.integer(
            "sliding_window_pattern", 1, MAX_LAYERS, default=DEFAULT_WINDOW_PATTERN
        )
    # Layers from `first` on have a window, except each `every`th one (0: no exception).
    kinds: tuple[LayerKind, ...] = tuple(
        "sliding_attention"
        if layer >= first and (not every or (layer + 1) % every)
        else "full_attention"
        for layer in range(num_layers)
    )
    if not fields.has("layer_types"):
        return window, kinds
    types = fields.strings("layer_types")
    if len(types) != num_layers or set(types) - set(LAYER_KINDS):
        raise fields.refuse(
            "layer_types", f"must be {num_layers} of full_attention and sliding_attention"
        )
    if "sliding_attention" in types and not said:
        raise fields.refuse("layer_types", "names sliding_attention but there is no sliding_window")
    # transformers reads layer_types only in families whose layers may differ. In the other families
    # it must agree with what the family does.
    if window and architecture.window in ("none", "all") and tuple(types) != kinds:
        raise fields.refuse("layer_types", "contradicts sliding_window")
    return window, tuple(cast(list[LayerKind], types))


def _window(fields: Fields, architecture: Architecture, max_model_len: int) -> int:
    if architecture.window in ("none", "upper"):  # transformers ignores the key in other families
        is_used = fields.boolean("use_sliding_window", default=architecture.window == "none")
        if not is_used:
            return 0
    if not fields.has("sliding_window"):
        return 0
    window = fields.integer("sliding_window", 1, MAX_CONTEXT)
    if architecture.window == "none" and window < max_model_len:
        raise fields.refuse("sliding_window", "is not supported for this architecture")
    return window


def _dtype(fields: Fields) -> CheckpointDtype:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    dtype = fields.string(key, default="float32", is_nullable=True).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise fields.refuse(key, "must be float32, bfloat16 or float16")
    return cast(CheckpointDtype, dtype)
