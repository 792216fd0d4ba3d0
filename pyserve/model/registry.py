"""The architectures that decoder.py can run, as data: one row each, no code.

A row says how config.json is read (defaults included) and which parts the layers have. The names
are those of `architectures` in config.json.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What sets one architecture apart.

    attention_bias    bias of q, k and v: by the config key of that name, or what it always is.
    has_o_bias        the output projection has a bias where q, k and v have one.
    mlp_bias          bias of gate, up and down: by the config key of that name, or never.
    qk_norm           RMSNorm over each head of q and k before they are rotated.
    window            which layers have a sliding window: none, all of them, or, where
                      `use_sliding_window` is set, those from `max_window_layers` on.
    default_head_dim  where config.json has none; None: hidden_size / num_attention_heads.
    """

    attention_bias: Literal["config", "always", "never"] = "never"
    has_o_bias: bool = False
    mlp_bias: Literal["config", "never"] = "never"
    qk_norm: bool = False
    window: Literal["none", "all", "upper"] = "none"
    default_head_dim: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(attention_bias="config", has_o_bias=True, mlp_bias="config"),
    "MistralForCausalLM": Architecture(window="all"),
    "Qwen2ForCausalLM": Architecture(attention_bias="always", window="upper"),
    "Qwen3ForCausalLM": Architecture(
        attention_bias="config",
        has_o_bias=True,
        qk_norm=True,
        window="upper",
        default_head_dim=128,
    ),
}
