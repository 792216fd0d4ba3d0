"""LayerConfig: a description of one decoder layer, the same for all families. Imports no torch.

config.py makes LayerConfigs from config.json as the rows of registry.py say, and decoder.py makes
layers from them. The CUDA ops support less than can be described: `lacking_on_cuda` names what is
missing.
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
    """The checkpoint's names of a layer's modules.

    qkv, gate_up   one name for each part, or a single name if the checkpoint stores them fused in
                   this order.
    mlp            the MLP or mixture of experts. In a mixture, `router`, `experts`, `shared_expert`
                   and `shared_gate` are within it, and `gate_up` and `down` within each expert.
    norms_before   norms of the inputs of attention and MLP.
    norms_after    norms of their outputs, before these are added to the residual; None in most
                   families.
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
    """RMSNorm. `offset` is added to the stored weight: 1 in families that store weight - 1."""

    eps: float
    offset: float = 0.0


class AttentionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Attention of a layer.

    softmax_scale  factor of the scores.
    softcap        scaled scores become softcap * tanh(score / softcap); 0: no cap.
    window         number of tokens that a token attends to, itself included; 0: all.
    has_qk_norm    RMSNorm over each head of q and k before they are rotated.
    has_pairs      the checkpoint's rotation pairs neighbouring dimensions, not those half a head
                   apart. The rows of q and k are reordered at loading, so that the ops always pair
                   the halves.
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
        """Number of leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def joined_size(self) -> int:
        """Inputs of the output projection."""
        return self.num_heads * self.head_dim


class MLPConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The gated MLP: down(activation(gate(x)) * up(x)), of inner width `size`."""

    size: int
    activation: Activation = "silu"
    has_bias: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Inner widths that tensor parallel ranks divide among them."""
        return (self.size,)


class LayerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer. `norm` describes all of its norms."""

    attention: AttentionConfig | LatentConfig
    mlp: MLPConfig | ExpertsConfig
    norm: NormConfig
    names: LayerNames = LayerNames()

    def lacking_on_cuda(self) -> list[str]:
        """Descriptions of what the layer needs and our CUDA kernels do not support; [] if none."""
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
