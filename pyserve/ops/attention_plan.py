"""Sizes of an AttentionPlan: what plan_attention writes and paged_attention's partial results."""

from __future__ import annotations

import torch

from pyserve.ops import AttentionPlan

DECODE_ROWS = 16  # kDecodeRows of cuda/gpu/attention.h


def decode_query_len(num_heads: int, num_kv_heads: int) -> int:
    """The longest query that the decode kernel takes; 0 where the group is too large for it."""
    return DECODE_ROWS // (num_heads // num_kv_heads)


def allocate(
    max_num_tokens: int, max_num_rows: int, *, num_heads: int, num_kv_heads: int, head_dim: int,
    device: torch.device,
) -> AttentionPlan:  # fmt: skip
    """A plan for the largest step. (The decode author fills in the sizes.)"""
    raise NotImplementedError
