"""LayerConfig: one decoder layer described, the same for all families. Imports no torch.

Rows of registry.py say how config.json is read into these; decoder.py makes layers of them. What
they can say is more than the ops of a card compute: `lacking_on_cuda` names the difference.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pyserve.limits import (
    CUDA_CAPPED_HEAD_DIMS,
    CUDA_HEAD_DIMS,
    CUDA_LATENT_SIZES,
    EXPERTS_STEP,
    HEAD_DIM_STEP,
)
from pyserve.model.experts_config import ExpertsConfig
from pyserve.model.latent_config import LatentConfig
from pyserve.model.rope_config import RopeConfig

Activation = Literal["silu", "gelu_tanh"]
LayerKind = Literal["full_attention", "sliding_attention"]  # as `layer_types` of config.json
LAYER_KINDS: tuple[LayerKind, ...] = ("full_attention", "sliding_attention")


class LayerNames(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint calls a layer's modules.

    qkv, gate_up   one name for each part, or one for all of them fused, in this order.
    norms_before   of the attention and of the MLP.
    norms_after    the same, of what they return, before it is added; none in most families.
    mlp            of a mixture of experts too, whose `router`, `experts` and so on are within it;
                   `gate_up` and `down` are then names within each expert.
    """

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    router: str = "gate"
    experts: str = "experts"
    shared_expert: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"
    norms_before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str, str] | None = None


class NormConfig(msgspec.Struct, frozen=True, kw_only=True):
    """RMSNorm. offset: added to the stored weight; 1 where a weight of 0 changes nothing."""

    eps: float
    offset: float = 0.0


class AttentionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Attention of a layer.

    window         tokens that a token sees, itself included; 0: all.
    softmax_scale  of the scores, after which they are softcap * tanh(score / softcap); 0: no cap.
    has_qk_norm    RMSNorm over each head of q and k before they are rotated.
    has_pairs      neighbours are rotated together in the checkpoint, not the halves of a head. Rows
                   of q and k are put in the order of the halves when they are loaded.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    softmax_scale: float
    softcap: float = 0.0
    window: int = 0
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_qk_norm: bool = False
    has_pairs: bool = False

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def joined_size(self) -> int:
        """What all heads give to the output projection."""
        return self.num_heads * self.head_dim


class MLPConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The gated MLP: down(activation(gate(x)) * up(x)), of `size` between."""

    size: int
    activation: Activation = "silu"
    has_bias: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Inner widths, which ranks share."""
        return (self.size,)


class LayerConfig(msgspec.Struct, frozen=True, kw_only=True):
    attention: AttentionConfig | LatentConfig
    mlp: MLPConfig | ExpertsConfig
    norm: NormConfig
    names: LayerNames = LayerNames()

    def lacking_on_cuda(self) -> list[str]:
        """What it asks for that a card does not serve."""
        lacks, attention = [], self.attention
        if isinstance(attention, LatentConfig):
            sizes = attention.kv_lora_rank, attention.qk_rope_head_dim
            if sizes != CUDA_LATENT_SIZES:
                lacks.append("kv_lora_rank {} with qk_rope_head_dim {}".format(*sizes))
            elif attention.qk_nope_head_dim % HEAD_DIM_STEP:
                lacks.append(f"qk_nope_head_dim {attention.qk_nope_head_dim}")
        elif attention.head_dim not in CUDA_HEAD_DIMS:
            lacks.append(f"head_dim {attention.head_dim}")
        elif attention.softcap and attention.head_dim not in CUDA_CAPPED_HEAD_DIMS:
            lacks.append(f"scores capped at {attention.softcap:g} of head_dim {attention.head_dim}")
        if isinstance(self.mlp, ExpertsConfig) and self.mlp.size % EXPERTS_STEP:
            lacks.append(f"experts of width {self.mlp.size}, no multiple of {EXPERTS_STEP}")
        return lacks
