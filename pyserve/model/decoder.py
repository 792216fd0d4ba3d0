"""Decoder: embedding, layers of attention and gated MLP with RMSNorm before each, output head.

One class for all rows of registry.py. The residual stream is one tensor, updated in place by the
norms: each norm adds what the block before it returned. Layers are called in the plainest way, as
a small model's step is mostly these calls.
"""

from __future__ import annotations

import torch

from pyserve import ops
from pyserve.model.activations import Activations, Arena, LayerActivations
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
from pyserve.ops import attention_plan


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

    @property
    def decode_query_len(self) -> int:
        """The longest query that counts as decoding."""
        return attention_plan.decode_query_len(self.config.num_heads, self.config.num_kv_heads)

    def plan(self, ctx: ForwardContext) -> None:
        """What is worked out once a step for all layers; before `forward`."""
        for window, plan in ctx.attention_plans.items():
            ops.plan_attention(
                ctx.cu_seqlens_q,
                ctx.seq_lens,
                plan,
                num_heads=self.config.num_heads,
                num_kv_heads=self.config.num_kv_heads,
                window=window,
            )

    def forward(self, ctx: ForwardContext) -> torch.Tensor:
        """Hidden states after the last norm, ctx.activations.hidden; writes the KV caches."""
        hidden, residual, output, acts = ctx.activations
        self.embedding(ctx.input_ids, residual)
        self.first_norm(residual, hidden)
        for layer, cache, (attention, mlp) in zip(self.layers, ctx.kv_caches, acts, strict=True):
            layer.attention(hidden, ctx, cache, attention, output)
            layer.post_attention_norm.add(output, residual, hidden)
            layer.mlp(hidden, mlp, output)
            layer.next_norm.add(output, residual, hidden)
        return hidden

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """hidden [n, hidden_size] -> out [n, vocab_size] in the model's dtype"""
        self.head(hidden, out)

    def activations(self, arena: Arena, num_tokens: int) -> Activations:
        """Take what a forward of num_tokens tokens needs."""
        hidden, residual, output = (
            arena.take(num_tokens, self.config.hidden_size, dtype=self.dtype) for _ in range(3)
        )
        made: dict[tuple[int, ...], LayerActivations] = {}  # layers of the same sizes share them
        layers = []
        for layer in self.layers:
            sizes = (*layer.attention.sizes, layer.mlp.gate_up.out_features)
            if sizes not in made:
                with arena.reused():
                    attention = layer.attention.activations(arena, num_tokens)
                with arena.reused():
                    mlp = layer.mlp.activations(arena, num_tokens)
                made[sizes] = attention, mlp
            layers.append(made[sizes])
        return Activations(hidden, residual, output, layers)

    def attention_plans(
        self, max_num_tokens: int, max_num_rows: int, device: torch.device
    ) -> dict[int, ops.AttentionPlan]:
        """By window: room for what `plan` works out for a step of that size on a card."""
        config = self.config
        return {
            window: attention_plan.allocate(
                max_num_tokens, max_num_rows, num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, device=device,
            )
            for window in set(config.windows)
        }  # fmt: skip

    def bytes_per_position(self) -> int:
        """Of the tables that have a row for each position."""
        tables = {id(layer.attention.cos_sin): layer.attention.cos_sin for layer in self.layers}
        return sum(table.nbytes // len(table) for table in tables.values())

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
