"""Typed wrappers of the ops of multi-head latent attention (DeepSeek-V2, 2024), as those in
__init__.py.

Of a token one row is kept for all heads: its latent, normed, of latent_size, and the part of the
keys that is rotated, of rope_dim. latent_cache is [num_blocks, block_size, latent_size + rope_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import AttentionPlan
from pyserve.ops.native import native

MAX_BATCHED_ROWS = 8  # as cuda/gpu/layers/latent.h has it


def rope_write_latent(
    q: Tensor, compressed: Tensor, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor,
    norm_weight: Tensor, latent_cache: Tensor, rotated: Tensor, *, eps: float, has_pairs: bool,
) -> None:  # fmt: skip
    """Rotary embedding (Su et al. 2021) of queries, and what is kept of each token.

    q [num_tokens, num_heads, rope_dim], rotated -> `rotated`, of the same shape; any strides.
    compressed [num_tokens, latent_size + rope_dim]: rms_norm of its first part by norm_weight
    [latent_size], and its second part rotated, go to latent_cache at slot_mapping (int64
    [num_tokens], -1 writes nothing). positions int32 [num_tokens]; cos_sin float32
    [max_position, rope_dim], cosines then sines. With has_pairs, elements 2i and 2i + 1 are rotated
    together and come to stand half of rope_dim apart; else those that stand so are.
    Raises RuntimeError where a position or a slot is out of range.
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
    """Causal attention of all heads over the kept rows: as keys, and their first part as values.

    q [num_tokens, num_heads, latent_size + rope_dim], in the latent's place W_UK^T q of a head ->
    out [num_tokens, num_heads, latent_size]; any strides. All others are those of
    ops.paged_attention; tokens of no row leave their output undefined.
    """
    native.latent_attention(
        q, latent_cache, block_table, row_slots, cu_seqlens_q, seq_lens, softmax_scale,
        q.shape[0] if max_query_len is None else max_query_len,
        None if plan is None else plan.work, None if plan is None else plan.workspace, out,
    )  # fmt: skip


def batched_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[:, i] = x[:, i] weight[i]^T, with a matrix a head.

    x [m, batch, k], weight [batch, n, k] -> out [m, batch, n]; x and out with any strides. Of many
    rows by torch: on a card of more than MAX_BATCHED_ROWS, on a CPU as `linear`.
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
