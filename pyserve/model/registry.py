"""The architectures that decoder.py can run, as data: one row each, no code.

A row says how config.json is read (defaults included) and which parts the layers have. The names
are those of `architectures` in config.json.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SchemeName = Literal["dense"]

# `quant_method` of config.json -> the scheme of schemes.py that reads such a checkpoint.
QUANT_METHODS: dict[str, SchemeName] = {}


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What sets one architecture apart.

    model_type        as transformers calls the family, which goes by this name.
    default_kv_heads  where num_key_value_heads is absent; None, and null: num_attention_heads.
    attention_bias    bias of q, k and v: by the config key of that name, or what it always is.
    has_o_bias        the output projection has a bias where q, k and v have one.
    mlp_bias          bias of gate, up and down: by the config key of that name, or never.
    qk_norm           RMSNorm over each head of q and k before they are rotated.
    window            which layers have a sliding window: none; all of them, whatever
                      `use_sliding_window` says; or, where that is true, those from
                      `max_window_layers` on.
    default_head_dim  where config.json has none; None, and then null too: hidden_size /
                      num_attention_heads.
    """

    model_type: str
    default_kv_heads: int | None = None
    attention_bias: Literal["config", "always", "never"] = "never"
    has_o_bias: bool = False
    mlp_bias: Literal["config", "never"] = "never"
    qk_norm: bool = False
    window: Literal["none", "all", "upper"] = "none"
    default_head_dim: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", attention_bias="config", has_o_bias=True, mlp_bias="config"
    ),
    "MistralForCausalLM": Architecture(model_type="mistral", default_kv_heads=8, window="all"),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2", default_kv_heads=32, attention_bias="always", window="upper"
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3",
        default_kv_heads=32,
        attention_bias="config",
        has_o_bias=True,
        qk_norm=True,
        window="upper",
        default_head_dim=128,
    ),
}
