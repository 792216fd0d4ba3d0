"""Plain-torch twins of the ops of multi-head latent attention; see reference.py and latent.py."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_write_latent(
    q: Tensor, compressed: Tensor, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor,
    norm_weight: Tensor, eps: float, has_pairs: bool, rotated: Tensor, latent_cache: Tensor,
) -> None:  # fmt: skip
    """Rotate q; norm the latent, rotate the rest of `compressed`, and write both to the cache."""
    latent_size, block_size = len(norm_weight), latent_cache.shape[1]
    if bool(((positions < 0) | (positions >= cos_sin.shape[0])).any()):
        raise RuntimeError(f"rope_write_latent: a position is outside [0, {cos_sin.shape[0]})")
    num_kv_slots = latent_cache.shape[0] * block_size
    if bool(((slot_mapping < -1) | (slot_mapping >= num_kv_slots)).any()):
        raise RuntimeError(f"rope_write_latent: a KV slot is outside [-1, {num_kv_slots})")
    rows = cos_sin[positions.long()]
    rotated.copy_(_rotate(q, rows[:, None], has_pairs))
    latent = compressed[:, :latent_size].float()
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps)
    kept = torch.cat(
        (latent * norm_weight.float(), _rotate(compressed[:, latent_size:], rows, has_pairs)), -1
    )
    written = slot_mapping >= 0
    blocks, offsets = slot_mapping[written] // block_size, slot_mapping[written] % block_size
    latent_cache[blocks, offsets] = kept[written].to(latent_cache.dtype)


def _rotate(x: Tensor, cos_sin: Tensor, has_pairs: bool) -> Tensor:
    """Rotate all of the last dimension, in float32."""
    x = x.float()
    first, second = (x[..., ::2], x[..., 1::2]) if has_pairs else x.chunk(2, -1)
    cos, sin = cos_sin.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def latent_attention(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, row_slots: Tensor, cu_seqlens_q: Tensor,
    seq_lens: Tensor, softmax_scale: float, max_query_len: int, work: Tensor | None,
    workspace: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Causal attention of each row's queries over the latents of its slot. max_query_len, work and
    workspace only say how a card may divide the work, and are not used here."""
    block_size, latent_size = latent_cache.shape[1], out.shape[2]
    starts, lens = cu_seqlens_q.tolist(), seq_lens.tolist()
    for row, slot in enumerate(row_slots.tolist()):
        begin, end, seq_len = starts[row], starts[row + 1], lens[row]
        if slot < 0 or begin == end:
            continue
        blocks = block_table[slot, : -(-seq_len // block_size)].long()
        kept = latent_cache[blocks].flatten(0, 1)[:seq_len].float()
        scores = torch.einsum("qhd,kd->hqk", q[begin:end].float(), kept) * softmax_scale
        query_positions = torch.arange(seq_len - (end - begin), seq_len, device=q.device)[:, None]
        is_hidden = torch.arange(seq_len, device=q.device)[None, :] > query_positions
        weights = scores.masked_fill(is_hidden, float("-inf")).softmax(dim=-1)
        out[begin:end].copy_(torch.einsum("hqk,kd->qhd", weights, kept[:, :latent_size]))


def batched_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[:, i] = x[:, i] weight[i]^T"""
    out.copy_(torch.einsum("mbk,bnk->mbn", x.float(), weight.float()))
