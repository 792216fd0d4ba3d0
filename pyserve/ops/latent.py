"""Typed wrappers of the ops of multi-head latent attention (DeepSeek-V2, 2024), like those in
__init__.py.

The cache holds one vector for each token: its normed latent of latent_size elements, and the
rotated part of the keys of rope_dim elements, which all heads share. latent_cache is
[num_blocks, block_size, latent_size + rope_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import AttentionPlan
from pyserve.ops.native import native

MAX_BATCHED_ROWS = 8  # the limit of the CUDA kernel, as in cuda/gpu/layers/latent.h


def rope_write_latent(
    q: Tensor, compressed: Tensor, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor,
    norm_weight: Tensor, latent_cache: Tensor, rotated: Tensor, *, eps: float, has_pairs: bool,
) -> None:  # fmt: skip
    """Rotate the queries (Su et al. 2021), and write each token's vector to the cache.

    q [num_tokens, num_heads, rope_dim], rotated -> `rotated`, of the same shape; any strides.
    compressed [num_tokens, latent_size + rope_dim]: rms_norm of its first part by norm_weight
    [latent_size], and its second part rotated, go to latent_cache at slot_mapping (int64
    [num_tokens], -1 writes nothing). positions int32 [num_tokens]; cos_sin float32
    [max_position, rope_dim], cosines then sines. With has_pairs, elements 2i and 2i + 1 are rotated
    together and written half of rope_dim apart; otherwise elements half of rope_dim apart are.
    Raises RuntimeError if a position or a slot is out of range.
    """
    native.rope_write_latent(
        q, compressed, positions, cos_sin, slot_mapping, norm_weight, eps, has_pairs, rotated,
        latent_cache,
    )  # fmt: skip


def latent_attention(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, row_slots: Tensor, cu_seqlens_q: Tensor,
    seq_lens: Tensor, *, softmax_scale: float, out: Tensor, max_query_len: int | None = None,
    plan: AttentionPlan | None = None,
) -> None:  # fmt: skip
    """Causal attention of all heads over the cached vectors: the keys are the whole vectors, the
    values their first latent_size elements.

    q [num_tokens, num_heads, latent_size + rope_dim]: W_UK^T times the unrotated part of a query,
    then its rotated part -> out [num_tokens, num_heads, latent_size]; any strides. All other
    arguments are as in ops.paged_attention. The output of padding tokens is undefined.
    """
    native.latent_attention(
        q, latent_cache, block_table, row_slots, cu_seqlens_q, seq_lens, softmax_scale,
        q.shape[0] if max_query_len is None else max_query_len,
        None if plan is None else plan.work, None if plan is None else plan.workspace, out,
    )  # fmt: skip


def batched_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[:, i] = x[:, i] weight[i]^T, with one matrix for each head i.

    x [m, batch, k], weight [batch, n, k] -> out [m, batch, n]; x and out with any strides. With
    many rows torch computes it: on a card with more than MAX_BATCHED_ROWS, on a CPU as in
    ops.linear.
    """
    num_rows = x.shape[0]
    if x.is_cuda:
        is_own = num_rows <= MAX_BATCHED_ROWS
    else:
        is_own = native.serves_linear(weight[0], num_rows, ops.STORE)
    if is_own:
        native.batched_linear(x, weight, out)
    else:
        torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
