"""Multi-head latent attention (DeepSeek-V2, 2024): the KV cache holds one vector per token, the
latent, from which each head computes its keys (W_UK) and values (W_UV).

Keys and values are never expanded here. Instead each query is multiplied by W_UK^T and attends to
the latents themselves, and the result is multiplied by W_UV: the paper calls these matrices
"absorbed". This costs more operations in the prefill of long prompts than expanding keys and values
would: with the sizes of DeepSeek-V3 (512 + 576) / (192 + 128) = 3.4 times as many.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pyserve.model.activations import Arena, LatentActivations
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destinations, finish_loading
from pyserve.model.kv import KVCache, KVSpec, KVTensor
from pyserve.model.latent_config import LatentConfig
from pyserve.model.layer_config import LayerConfig, NormConfig
from pyserve.model.layers.linear import Apply, Linear, Output
from pyserve.model.layers.norm import RMSNorm
from pyserve.model.placement import Placement
from pyserve.ops import latent
from pyserve.ops.attention_plan import DECODE_ROWS

NORM = NormConfig(eps=1e-6)  # the norm of the latents, independent of rms_norm_eps


class LatentAttention:
    """Takes the place of Attention; `sizes`, `is_adding` and `is_partial` are as there.

    compress   Linear: hidden state -> [query latent |] KV latent | rotated part of the keys; whole
               on every rank
    queries    Linear: query latent, or hidden state if q_lora_rank is 0 -> this rank's heads of q,
               [nope | rope] each
    expand     Linear with W_UK and W_UV as the checkpoint stores them: KV latent -> [nope | v] of
               each head; None once loading has split it into w_uk and w_uv
    w_uk       [num_heads, kv_lora_rank, qk_nope_head_dim], transposed
    w_uv       [num_heads, v_head_dim, kv_lora_rank]
    """

    __slots__ = (
        "compress", "queries", "expand", "o", "q_norm", "kv_norm", "w_uk", "w_uv", "cos_sin",
        "sizes", "is_adding", "is_partial", "_config", "_num_heads", "_project", "_dtype",
    )  # fmt: skip

    def __init__(
        self, name: str, layer: LayerConfig, hidden_size: int, placement: Placement, *,
        cos_sin: torch.Tensor, has_norm_after: bool,
    ) -> None:  # fmt: skip
        config = layer.attention
        assert isinstance(config, LatentConfig)
        self._config, self._dtype, self.cos_sin = config, placement.dtype, cos_sin
        name = f"{name}.{layer.names.attention}"
        q_size, latent_size, num_heads = config.q_lora_rank, config.kv_lora_rank, config.num_heads
        outputs = [Output(f"{name}.kv_a_proj_with_mqa", config.width)]
        self.q_norm: RMSNorm | None = None
        if q_size:
            outputs.insert(0, Output(f"{name}.q_a_proj", q_size))
            self.q_norm = RMSNorm(f"{name}.q_a_layernorm", q_size, NORM, placement)
        self.compress = Linear(outputs, hidden_size, placement, has_bias=config.has_bias)
        self.kv_norm = RMSNorm(f"{name}.kv_a_layernorm", latent_size, NORM, placement)
        q_name = f"{name}.q_b_proj" if q_size else f"{name}.q_proj"
        self.queries = Linear(
            [Output(q_name, num_heads, config.head_dim)], q_size or hidden_size, placement,
            shard="column",
        )  # fmt: skip
        # Without adapter slots, because an adapter of kv_b_proj could not be absorbed.
        self.expand: Linear | None = Linear(
            [Output(f"{name}.kv_b_proj", num_heads, config.qk_nope_head_dim + config.v_head_dim)],
            latent_size, replace(placement, num_adapter_slots=0, max_adapter_rank=0),
            shard="column",
        )  # fmt: skip
        self.o = Linear(
            [Output(f"{name}.{layer.names.o}", hidden_size)], config.joined_size, placement,
            has_bias=config.has_bias, shard="row", is_summed_later=not has_norm_after,
        )  # fmt: skip
        self.is_adding = self.o.has_add and not has_norm_after
        self.is_partial = self.o.is_partial
        self._project: Apply = self.o.add if self.is_adding else self.o
        self._num_heads = placement.share(num_heads).size
        self.sizes = self._num_heads, num_tiles(self._num_heads), latent_size

    def __call__(
        self, x: torch.Tensor, ctx: ForwardContext, cache: KVCache, act: LatentActivations,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """x [num_tokens, hidden_size] -> out, of the same shape; `cache` is as kv_spec has it."""
        config, (latent_cache,) = self._config, cache
        nope, latent_size = config.qk_nope_head_dim, config.kv_lora_rank
        self.compress(x, act.compressed, ctx.adapters)
        if self.q_norm is not None:
            x = act.compressed[:, : config.q_lora_rank]
            self.q_norm(x, x)
        self.queries(x, act.q.flatten(1), ctx.adapters)
        latent.rope_write_latent(
            act.q[..., nope:], act.compressed[:, config.q_lora_rank :], ctx.positions,
            self.cos_sin, ctx.slot_mapping, self.kv_norm.weight, latent_cache,
            act.absorbed[..., latent_size:], eps=NORM.eps, has_pairs=config.has_pairs,
        )  # fmt: skip
        latent.batched_linear(act.q[..., :nope], self.w_uk, act.absorbed[..., :latent_size])
        latent.latent_attention(
            act.absorbed, latent_cache, ctx.block_table, ctx.row_slots, ctx.cu_seqlens_q,
            ctx.seq_lens, softmax_scale=config.softmax_scale, out=act.latents,
            max_query_len=ctx.max_query_len, plan=ctx.attention_plans.get(config.window),
        )  # fmt: skip
        latent.batched_linear(act.latents, self.w_uv, act.heads)
        self._project(act.heads.flatten(1), out, ctx.adapters)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The Linears whose matrices every step reads."""
        expand = () if self.expand is None else (self.expand,)
        return (self.compress, self.queries, *expand, self.o)

    @property
    def has_norm_factors(self) -> bool:
        """Whether the norms before and after it can be fused into its Linears: never."""
        return False

    @property
    def flop_per_pair(self) -> int:
        """Floating-point operations for one query token and one key token, in this rank's heads."""
        return 2 * self._num_heads * (self._config.width + self._config.kv_lora_rank)

    def activations(self, arena: Arena, num_tokens: int) -> LatentActivations:
        def take(*shape: int) -> torch.Tensor:
            return arena.take(num_tokens, *shape, dtype=self._dtype)

        config, num_heads = self._config, self._num_heads
        return LatentActivations(
            compressed=take(config.q_lora_rank + config.width),
            q=take(num_heads, config.head_dim),
            absorbed=take(num_heads, config.width),
            latents=take(num_heads, config.kv_lora_rank),
            heads=take(num_heads, config.v_head_dim),
        )

    def kv_spec(self) -> KVSpec:
        return KVSpec((KVTensor((self._config.width,), self._dtype),))

    def destinations(self) -> Destinations:
        """Where its tensors go; after loading, those of `expand` are not included."""
        destinations = self.compress.destinations() | self.queries.destinations()
        if self.expand is not None:
            destinations |= {
                name: replace(place, finish=self._split)
                for name, place in self.expand.destinations().items()
            }
        for norm in (self.q_norm, self.kv_norm):
            if norm is not None:
                destinations |= norm.destinations()
        return destinations | self.o.destinations()

    def _split(self) -> None:
        """Split the loaded matrix of `expand` into w_uk and w_uv, which replace it."""
        assert self.expand is not None
        finish_loading(self.expand.destinations().values())  # as `finish` was replaced by this
        nope = self._config.qk_nope_head_dim
        heads = self.expand.matrix.plain().view(self._num_heads, -1, self._config.kv_lora_rank)
        self.w_uk = heads[:, :nope].transpose(1, 2).contiguous()
        self.w_uv = heads[:, nope:].contiguous()
        self.expand = None


def num_tiles(num_heads: int) -> int:
    """The number of equal groups of heads, of at most DECODE_ROWS each, that the CUDA kernel
    processes one by one."""
    tiles = range(1, num_heads + 1)
    return next(n for n in tiles if num_heads % n == 0 and num_heads // n <= DECODE_ROWS)
