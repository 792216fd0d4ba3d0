"""Decoder: embedding, layers of attention and gated MLP with RMSNorm before each, output head.

One class for all rows of registry.py. The residual stream is one tensor, updated in place by the
norms: each norm adds what the block before it returned. Layers are called in the plainest way, as
a small model's step is mostly these calls.
"""

from __future__ import annotations

import torch

from pyserve.model.config import ModelConfig
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destinations
from pyserve.model.kv import KVSpec
from pyserve.model.layers.attention import Attention
from pyserve.model.layers.embedding import Embedding
from pyserve.model.layers.linear import Linear, Output
from pyserve.model.layers.mlp import MLP
from pyserve.model.layers.norm import RMSNorm
from pyserve.model.layers.rotary import cos_sin_table
from pyserve.model.placement import Placement


class DecoderLayer:
    """`next_norm` is the input norm of the layer above, or the model's last one."""

    __slots__ = ("attention", "post_attention_norm", "mlp", "next_norm")

    def __init__(
        self, attention: Attention, post_attention_norm: RMSNorm, mlp: MLP, next_norm: RMSNorm
    ) -> None:
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.mlp = mlp
        self.next_norm = next_norm


class Decoder:
    """Parameters are allocated, not filled: see loader.py.

    max_model_len bounds the positions that may come (a row of the rope table each); None: all that
    the model supports.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        *,
        max_model_len: int | None = None,
    ) -> None:
        assert placement.tp_size == 1 or placement.device.type == "meta", "ranks cannot compute yet"
        self.config = config
        self.dtype = placement.dtype
        self.device = placement.device
        hidden_size, eps = config.hidden_size, config.rms_norm_eps

        def norm(name: str) -> RMSNorm:
            return RMSNorm(name, hidden_size, eps, placement)

        self.embedding = Embedding("model.embed_tokens", config.vocab_size, hidden_size, placement)
        cos_sin = cos_sin_table(
            config.rope, config.head_dim, max_model_len or config.max_model_len, device=self.device
        )
        names = [f"model.layers.{index}" for index in range(config.num_layers)]
        input_norms = [norm(f"{name}.input_layernorm") for name in names] + [norm("model.norm")]
        self.first_norm = input_norms[0]
        self.layers = [
            DecoderLayer(
                Attention(
                    f"{name}.self_attn",
                    config,
                    placement,
                    window=config.windows[index],
                    cos_sin=cos_sin,
                ),
                norm(f"{name}.post_attention_layernorm"),
                MLP(f"{name}.mlp", config, placement),
                input_norms[index + 1],
            )
            for index, name in enumerate(names)
        ]
        if config.tie_word_embeddings:
            self.head = Linear.tied(self.embedding.weight)
        else:
            self.head = Linear(
                [Output("lm_head", config.vocab_size)], hidden_size, placement, shard="vocabulary"
            )

    def forward(self, ctx: ForwardContext) -> torch.Tensor:
        """Hidden states after the last norm, [num_tokens, hidden_size]; writes the KV caches."""
        residual = self.embedding(ctx.input_ids)
        hidden = self.first_norm(residual)
        for layer, cache in zip(self.layers, ctx.kv_caches, strict=True):
            hidden = layer.attention(hidden, ctx, cache)
            hidden = layer.post_attention_norm.add(hidden, residual)
            hidden = layer.mlp(hidden)
            hidden = layer.next_norm.add(hidden, residual)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden_size] -> [n, vocab_size] in the model's dtype"""
        return self.head(hidden)

    def kv_specs(self) -> list[KVSpec]:
        """One per layer."""
        return [layer.attention.kv_spec() for layer in self.layers]

    def destinations(self) -> Destinations:
        """Where each tensor of the checkpoint goes, by its name there. Tied heads have none."""
        destinations = self.embedding.destinations() | self.first_norm.destinations()
        for layer in self.layers:
            destinations |= layer.attention.destinations()
            destinations |= layer.post_attention_norm.destinations()
            destinations |= layer.mlp.destinations()
            destinations |= layer.next_norm.destinations()
        return destinations | self.head.destinations()
