"""Attention: grouped-query attention over the paged KV cache. q, k and v are one fused Linear, and
the rotary embedding is fused with the KV write."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyserve import ops
from pyserve.errors import ConfigError
from pyserve.model.activations import Arena, AttentionActivations
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destinations
from pyserve.model.kv import KVCache, KVSpec
from pyserve.model.layer_config import AttentionConfig, LayerConfig
from pyserve.model.layers.linear import Apply, Linear, Output, fused_outputs
from pyserve.model.layers.norm import RMSNorm
from pyserve.model.placement import Placement
from pyserve.model.schemes import Dense
from pyserve.ops.attention_plan import decode_query_len


class Attention:
    """The attention of one layer. `cos_sin` and `query_scales` are as layers/rotary.py makes them.

    sizes      (num_heads, num_kv_heads, head_dim) of this rank; layers with equal sizes share
               activations.
    is_adding  `out` is the residual stream, to which the output is added; otherwise `out` is
               overwritten. True if no norm comes before the addition and the Linear `o` has_add.
    is_partial `out` is this rank's part of a sum over ranks, which the next norm must compute.
    """

    __slots__ = (
        "qkv", "o", "q_norm", "k_norm", "cos_sin", "sizes", "is_adding", "is_partial", "_project",
        "_window",
        "_num_heads", "_num_kv_heads", "_head_dim", "_q_size", "_softmax_scale", "_softcap",
        "_q_norm_weight", "_k_norm_weight", "_norm", "_query_scales", "_has_pairs", "_dtype",
        "_rope_query_len",
    )  # fmt: skip

    def __init__(
        self, name: str, layer: LayerConfig, hidden_size: int, placement: Placement, *,
        cos_sin: torch.Tensor, query_scales: torch.Tensor | None, has_norm_after: bool,
    ) -> None:  # fmt: skip
        config, names = layer.attention, layer.names
        assert isinstance(config, AttentionConfig)
        name = f"{name}.{names.attention}"
        head_dim = config.head_dim
        heads, kv_heads = (config.num_heads, head_dim), (config.num_kv_heads, head_dim)
        self.qkv = Linear(
            fused_outputs(name, names.qkv, [heads, kv_heads, kv_heads]),
            hidden_size,
            placement,
            has_bias=config.has_qkv_bias,
            shard="column",
        )
        self.o = Linear(
            [Output(f"{name}.{names.o}", hidden_size)],
            config.num_heads * head_dim,
            placement,
            has_bias=config.has_o_bias,
            shard="row",
            is_summed_later=not has_norm_after,
        )
        self.is_adding = self.o.has_add and not has_norm_after
        self.is_partial = self.o.is_partial
        self._project: Apply = self.o.add if self.is_adding else self.o
        self.q_norm = self.k_norm = None
        if config.has_qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, layer.norm, placement)
            self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, layer.norm, placement)
        self.cos_sin = cos_sin
        self._q_norm_weight = self.q_norm.weight if self.q_norm else None
        self._k_norm_weight = self.k_norm.weight if self.k_norm else None
        self._norm = layer.norm
        self._query_scales = query_scales
        self._dtype = placement.dtype
        self._window = config.window
        self._q_size = placement.share(*heads).size
        self._num_heads = self._q_size // head_dim
        self._num_kv_heads = placement.share(*kv_heads).size // head_dim
        self._head_dim = head_dim
        self.sizes = self._num_heads, self._num_kv_heads, head_dim
        self._softmax_scale, self._softcap = config.softmax_scale, config.softcap
        self._has_pairs = config.has_pairs
        if config.has_pairs and not isinstance(self.qkv.matrix, Dense):
            raise ConfigError(
                f"config.json: {name}.{names.qkv[0]} is quantised, and its neighbouring rows are "
                "rotated together: not supported"
            )
        if config.has_pairs and self.qkv.adapters is not None:
            order = torch.arange(self.qkv.out_features)
            self._put_halves_apart(order)
            self.qkv.adapters.reorder(order)
        # Steps with no longer queries than this use rope_attention, which fuses rope_write_kv.
        is_plain = self.q_norm is None and query_scales is None
        is_fused = is_plain and cos_sin.is_cuda and cos_sin.shape[1] == head_dim
        self._rope_query_len = decode_query_len(*self.sizes[:2]) if is_fused else 0

    def __call__(
        self, x: torch.Tensor, ctx: ForwardContext, cache: KVCache, act: AttentionActivations,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """x [num_tokens, hidden_size] -> out, of the same shape; `cache` is as kv_spec has it."""
        self.qkv(x, act.qkv, ctx.adapters)
        self.attend(ctx, cache, act)
        self._project(act.joined, out, ctx.adapters)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The Linears whose matrices every step reads."""
        return self.qkv, self.o

    @property
    def flop_per_pair(self) -> int:
        """Floating-point operations for one query token and one key token, in this rank's heads."""
        return 4 * self._q_size

    @property
    def has_norm_factors(self) -> bool:
        """Whether the norms before and after it can be fused into its Linears."""
        return self.qkv.has_norm_factor and self.is_adding and self.o.has_norm_factor

    def attend(self, ctx: ForwardContext, cache: KVCache, act: AttentionActivations) -> None:
        """The part between the two Linears: act.qkv -> act.joined; writes the KV cache."""
        key_cache, value_cache = cache
        plan = ctx.attention_plans.get(self._window)
        if plan is not None and ctx.max_query_len <= self._rope_query_len:
            ops.rope_attention(
                act.q, act.qkv, self.cos_sin, key_cache, value_cache, ctx.block_table,
                ctx.row_slots, ctx.cu_seqlens_q, ctx.seq_lens, softmax_scale=self._softmax_scale,
                window=self._window, plan=plan, out=act.heads, softcap=self._softcap,
            )  # fmt: skip
        else:
            ops.rope_write_kv(
                act.qkv, ctx.positions, self.cos_sin, ctx.slot_mapping, key_cache, value_cache,
                num_heads=self._num_heads, num_kv_heads=self._num_kv_heads,
                q_norm_weight=self._q_norm_weight, k_norm_weight=self._k_norm_weight,
                eps=self._norm.eps, norm_offset=self._norm.offset, q_scales=self._query_scales,
            )  # fmt: skip
            ops.paged_attention(
                act.q, key_cache, value_cache, ctx.block_table, ctx.row_slots, ctx.cu_seqlens_q,
                ctx.seq_lens, softmax_scale=self._softmax_scale, window=self._window,
                max_query_len=ctx.max_query_len, plan=plan, out=act.heads, softcap=self._softcap,
            )  # fmt: skip

    def activations(self, arena: Arena, num_tokens: int) -> AttentionActivations:
        (num_heads, _, head_dim), q_size = self.sizes, self._q_size
        qkv = arena.take(num_tokens, self.qkv.out_features, dtype=self._dtype)
        joined = arena.take(num_tokens, q_size, dtype=self._dtype)
        return AttentionActivations(
            qkv=qkv,
            q=qkv[:, :q_size].view(num_tokens, num_heads, head_dim),
            heads=joined.view(num_tokens, num_heads, head_dim),
            joined=joined,
        )

    def kv_spec(self) -> KVSpec:
        return KVSpec.of_heads(self._num_kv_heads, self._head_dim, self._dtype, self._window)

    def destinations(self) -> Destinations:
        destinations = self.qkv.destinations()
        if self._has_pairs:
            destinations = {
                name: replace(place, finish=self._order_halves)
                for name, place in destinations.items()
            }
        destinations |= self.o.destinations()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                destinations |= norm.destinations()
        return destinations

    def _order_halves(self) -> None:
        """Reorder the rows of q and k so that dimensions that are rotated together are half of
        rotary_dim apart. Scores do not change, as q and k are reordered alike."""
        assert isinstance(self.qkv.matrix, Dense)
        for parameter in (self.qkv.matrix.weight, self.qkv.bias):
            if parameter is not None:
                self._put_halves_apart(parameter)

    def _put_halves_apart(self, rows: torch.Tensor) -> None:
        """Reorder `rows`, whose first dimension is that of q | k | v, in place."""
        num_turned, rotary_dim = self._num_heads + self._num_kv_heads, self.cos_sin.shape[1]
        heads = rows[: num_turned * self._head_dim].view(num_turned, self._head_dim, -1)
        turned = heads[:, :rotary_dim]
        pairs = turned.reshape(num_turned, rotary_dim // 2, 2, -1)
        turned.copy_(pairs.transpose(1, 2).flatten(1, 2))
