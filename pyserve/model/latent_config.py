"""Multi-head latent attention: its sizes, read from config.json. Imports no torch."""

from __future__ import annotations

import msgspec

from pyserve.errors import ConfigError
from pyserve.limits import LATENT_STEP, MAX_LATENT_ROPE_DIM, MAX_LATENT_SIZE
from pyserve.model.fields import Fields
from pyserve.model.rope_config import RopeConfig

MAX_HEADS = 4096
MAX_SIZE = 2**16  # of what queries go through, and of a head's parts
LATENT_KEY, ROPE_KEY = "kv_lora_rank", "qk_rope_head_dim"
KNOWN_KEYS = frozenset(
    {"q_lora_rank", LATENT_KEY, "qk_nope_head_dim", ROPE_KEY, "v_head_dim", "qk_head_dim"}
)


class LatentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Attention of a layer that keeps one vector of a token for all heads (DeepSeek-V2, 2024).

    q_lora_rank      what the queries of all heads are made of; 0: of the hidden state itself.
    kv_lora_rank     what keys and values are made of, the latent.
    qk_nope_head_dim, qk_rope_head_dim
                     a head of q or k is these two parts. The second is rotated, and of k the same
                     for all heads.
    v_head_dim       of a head's values.
    softmax_scale    of the scores, with YaRN's part.
    has_bias         what makes the latent, and the output projection, have one.
    has_pairs        neighbours are rotated together, not the halves of the rotated part.
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
        """Of a query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Of what is kept of a token: the latent, then the rotated part of the keys."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def joined_size(self) -> int:
        """What all heads give to the output projection."""
        return self.num_heads * self.v_head_dim

    @property
    def num_kv_heads(self) -> int:
        """All heads read the same."""
        return 1

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def window(self) -> int:
        """There is none."""
        return 0


def rope_dim(fields: Fields) -> int:
    """qk_rope_head_dim, which is also what transformers calls head_dim here."""
    size = fields.integer(ROPE_KEY, LATENT_STEP, MAX_LATENT_ROPE_DIM)
    _check_step(fields, ROPE_KEY, size)
    if fields.has("head_dim") and fields.integer("head_dim", 1, MAX_SIZE) != size:
        raise fields.refuse("head_dim", f"must be {ROPE_KEY} ({size})")
    return size


def latent_from_fields(
    fields: Fields, num_heads: int, rope: RopeConfig, *, has_bias: bool, has_pairs: bool
) -> LatentConfig:
    """Raises ConfigError naming the key, the value and the limit."""
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
