"""The architectures that decoder.py can run, as data: one row each, no code.

A row says how config.json is read (defaults included) and which parts the layers have. The names
are those of `architectures` in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from pyserve.model.layer_config import Activation, LayerNames

SchemeName = Literal["dense", "w4a16"]


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What sets one architecture apart.

    model_type        as transformers calls the family, which goes by this name.
    default_kv_heads  where num_key_value_heads is absent; None, and null: num_attention_heads.
    default_head_dim  where config.json has none; None, and then null too: hidden_size /
                      num_attention_heads.
    attention_bias    bias of q, k and v: by the config key of that name, or what it always is.
    has_o_bias        the output projection has a bias where q, k and v have one.
    mlp_bias          bias of gate, up and down: by the config key of that name, or never.
    has_qk_norm       RMSNorm over each head of q and k before they are rotated.
    window            which layers have a sliding window: none; all of them, whatever
                      `use_sliding_window` says; every second one from the first on; or "upper":
                      where that is true, those from `max_window_layers` on.
    names             of the tensors of a layer.
    activation_keys   each that is there must name one of `activations`.
    is_tied           tie_word_embeddings where config.json does not say.
    norm_offset       as NormConfig.offset.
    query_scale_key   its value ** -0.5 is the softmax scale; None: head_dim is that value.
    has_softcaps      attn_logit_softcapping and final_logit_softcapping are read.
    is_embedding_scaled
                      embeddings are multiplied by sqrt(hidden_size).
    has_partial_rotary
                      partial_rotary_factor is read.
    has_ropes_by_kind rope_parameters may hold one table for each kind of layer.
    known_keys        of config.json that mean something, or nothing, in this family only.
    neutral           values that ask for nothing else than is computed, where they are other ones
                      than in most families: see unknown_fields.py.
    """

    model_type: str
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
    attention_bias: Literal["config", "always", "never"] = "never"
    has_o_bias: bool = False
    mlp_bias: Literal["config", "never"] = "never"
    has_qk_norm: bool = False
    window: Literal["none", "all", "alternate", "upper"] = "none"
    names: LayerNames = LayerNames()
    activation_keys: tuple[str, ...] = ("hidden_act", "hidden_activation")
    activations: Mapping[str, Activation] = msgspec.field(
        default_factory=lambda: {"silu": "silu", "swish": "silu"}
    )
    is_tied: bool = False
    norm_offset: float = 0.0
    query_scale_key: str | None = None
    has_softcaps: bool = False
    is_embedding_scaled: bool = False
    has_partial_rotary: bool = False
    has_ropes_by_kind: bool = False
    known_keys: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[object, ...]] = {}


_UPPER_KEYS = frozenset({"use_sliding_window", "max_window_layers"})
# Norms over the heads of q and k, as others call them.
_QK_NORM_KEYS = ("qk_layer_norms", "qk_layernorm", "qk_norm", "use_qk_norm")

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", attention_bias="config", has_o_bias=True, mlp_bias="config",
        known_keys=frozenset({"use_sliding_window"}),
    ),
    "MistralForCausalLM": Architecture(model_type="mistral", default_kv_heads=8, window="all"),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2", default_kv_heads=32, attention_bias="always", window="upper",
        known_keys=_UPPER_KEYS,
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3", default_kv_heads=32, default_head_dim=128, attention_bias="config",
        has_o_bias=True, has_qk_norm=True, window="upper", known_keys=_UPPER_KEYS,
        neutral=dict.fromkeys(_QK_NORM_KEYS, (True,)),
    ),
}  # fmt: skip
