"""Attention over the paged KV cache: fused q, k, v; rotation fused with the KV write; GQA."""

from __future__ import annotations

import torch

from pyserve import ops
from pyserve.model.config import ModelConfig
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destinations
from pyserve.model.layers.linear import Linear
from pyserve.model.layers.norm import RMSNorm


class Attention:
    """One layer's attention; `window` as in ModelConfig.windows, `cos_sin` as layers/rotary.py."""

    __slots__ = (
        "qkv", "o", "q_norm", "k_norm", "cos_sin", "_window", "_num_heads", "_num_kv_heads",
        "_head_dim", "_q_size", "_qkv_size", "_softmax_scale", "_q_norm_weight", "_k_norm_weight",
        "_eps",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        *,
        window: int,
        cos_sin: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        head_dim = config.head_dim
        q_size = config.num_heads * head_dim
        kv_size = config.num_kv_heads * head_dim
        self.qkv = Linear(
            {f"{name}.q_proj": q_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size},
            config.hidden_size,
            has_bias=config.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.o = Linear(
            {f"{name}.o_proj": config.hidden_size},
            q_size,
            has_bias=config.o_bias,
            dtype=dtype,
            device=device,
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, eps, dtype=dtype, device=device)
        self.cos_sin = cos_sin
        self._q_norm_weight = self.q_norm.weight if self.q_norm else None
        self._k_norm_weight = self.k_norm.weight if self.k_norm else None
        self._eps = config.rms_norm_eps
        self._window = window
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = head_dim
        self._q_size = q_size
        self._qkv_size = q_size + 2 * kv_size
        self._softmax_scale = head_dim**-0.5

    def __call__(
        self,
        x: torch.Tensor,
        ctx: ForwardContext,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> torch.Tensor:
        """x [num_tokens, hidden_size] -> the same shape"""
        num_tokens = x.shape[0]
        qkv = self.qkv(x)
        ops.rope_write_kv(
            qkv,
            ctx.positions,
            self.cos_sin,
            ctx.slot_mapping,
            key_cache,
            value_cache,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            q_norm_weight=self._q_norm_weight,
            k_norm_weight=self._k_norm_weight,
            eps=self._eps,
        )
        # One call where slicing and viewing would be two.
        q = qkv.as_strided(
            (num_tokens, self._num_heads, self._head_dim), (self._qkv_size, self._head_dim, 1)
        )
        out = ops.paged_attention(
            q,
            key_cache,
            value_cache,
            ctx.block_table,
            ctx.row_slots,
            ctx.cu_seqlens_q,
            ctx.seq_lens,
            softmax_scale=self._softmax_scale,
            window=self._window,
            max_query_len=ctx.max_query_len,
            plan=ctx.attention_plans.get(self._window),
        )
        return self.o(out.view(num_tokens, self._q_size))

    def destinations(self) -> Destinations:
        destinations = self.qkv.destinations() | self.o.destinations()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                destinations |= norm.destinations()
        return destinations
