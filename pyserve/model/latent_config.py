"""Multi-head latent attention: its sizes, read from config.json. Imports no torch."""

from __future__ import annotations

import msgspec

from pyserve.errors import ConfigError
from pyserve.limits import LATENT_STEP, MAX_LATENT_ROPE_DIM, MAX_LATENT_SIZE
from pyserve.model.fields import Fields
from pyserve.model.rope_config import RopeConfig

MAX_HEADS = 4096
MAX_SIZE = 2**16  # limit of q_lora_rank and of the parts of a head
LATENT_KEY, ROPE_KEY = "kv_lora_rank", "qk_rope_head_dim"
KNOWN_KEYS = frozenset(
    {"q_lora_rank", LATENT_KEY, "qk_nope_head_dim", ROPE_KEY, "v_head_dim", "qk_head_dim"}
)


class LatentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention: the KV cache holds one vector per token, from which the keys and
    values of all heads are computed (DeepSeek-V2, 2024).

    q_lora_rank      size of the latent that the queries of all heads are computed from; 0: they are
                     computed from the hidden state.
    kv_lora_rank     size of the latent that keys and values are computed from.
    qk_nope_head_dim, qk_rope_head_dim
                     sizes of the two parts of a head of q and k. Only the second is rotated; in k
                     it is the same for all heads.
    v_head_dim       size of a head of v.
    softmax_scale    scale of the scores; includes YaRN's factor.
    has_bias         the projections to the latents and the output projection have biases.
    has_pairs        rotation pairs neighbouring dimensions, not those half of the rotated part
                     apart.
    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    softmax_scale: float
    has_bias: bool = False
    has_pairs: bool = True

    @property
    def head_dim(self) -> int:
        """Size of a head of q and k."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Size of a token's cached vector: the latent, then the rotated part of the keys."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def joined_size(self) -> int:
        """Inputs of the output projection."""
        return self.num_heads * self.v_head_dim

    @property
    def num_kv_heads(self) -> int:
        """1: all heads read the same cached vectors."""
        return 1

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def window(self) -> int:
        """0: latent attention has no sliding window."""
        return 0


def rope_dim(fields: Fields) -> int:
    """Read qk_rope_head_dim, which transformers also calls head_dim here. Raises ConfigError."""
    size = fields.integer(ROPE_KEY, LATENT_STEP, MAX_LATENT_ROPE_DIM)
    _check_step(fields, ROPE_KEY, size)
    if fields.has("head_dim") and fields.integer("head_dim", 1, MAX_SIZE) != size:
        raise fields.refuse("head_dim", f"must be {ROPE_KEY} ({size})")
    return size


def latent_from_fields(
    fields: Fields, num_heads: int, rope: RopeConfig, *, has_bias: bool, has_pairs: bool
) -> LatentConfig:
    """Read the attention's sizes. Raises ConfigError naming the key, the value and the limit."""
    latent_size = fields.integer(LATENT_KEY, LATENT_STEP, MAX_LATENT_SIZE)
    _check_step(fields, LATENT_KEY, latent_size)
    key = "num_key_value_heads"
    if fields.integer(key, 1, MAX_HEADS, default=num_heads, is_nullable=True) != num_heads:
        raise fields.refuse(key, f"must be num_attention_heads ({num_heads})")
    q_lora_rank = 0
    if not fields.is_null("q_lora_rank"):
        q_lora_rank = fields.integer("q_lora_rank", 1, MAX_SIZE)
    nope_dim = fields.integer("qk_nope_head_dim", 1, MAX_SIZE)
    head_dim = nope_dim + rope_dim(fields)
    if fields.has("qk_head_dim") and fields.integer("qk_head_dim", 1, 2 * MAX_SIZE) != head_dim:
        raise fields.refuse("qk_head_dim", f"must be {head_dim}, the sum of its two parts")
    return LatentConfig(
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=latent_size,
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=rope_dim(fields),
        v_head_dim=fields.integer("v_head_dim", 1, MAX_SIZE),
        rope=rope,
        softmax_scale=head_dim**-0.5 * rope.latent_factor,
        has_bias=has_bias,
        has_pairs=has_pairs,
    )


def _check_step(fields: Fields, key: str, size: int) -> None:
    if size % LATENT_STEP:
        raise ConfigError(f"config.json: {key} must be a multiple of {LATENT_STEP}, got {size}")
