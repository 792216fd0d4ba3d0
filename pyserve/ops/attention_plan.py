"""Sizes of an AttentionPlan: the output of plan_attention, and paged_attention's partial results.

The constants and formulas repeat those of cuda/gpu/attention/attention.h, against which both ops
check a plan's sizes.
"""

from __future__ import annotations

import torch

from pyserve.ops import AttentionPlan

DECODE_ROWS = 16
PREFILL_ROWS = 128
KV_TILE = 64
ITEM_WORDS = 8
WORK_HEADER_WORDS = 16
MAX_DECODE_CTAS_PER_SM = 2
MAX_DECODE_RANGES = 1024

MAX_SMS = 192  # assumed number of multiprocessors where there is no card to ask


def decode_query_len(num_heads: int, num_kv_heads: int) -> int:
    """The most query tokens of a row that the decode kernel supports; 0 if a KV head has too many
    query heads for it."""
    return DECODE_ROWS // (num_heads // num_kv_heads)


def work_words(
    max_num_tokens: int, max_num_rows: int, *, num_heads: int, num_kv_heads: int, num_sms: int
) -> int:
    """Number of int32 words of `work` that are enough for any step of this size."""
    num_ranges = _num_decode_ranges(num_sms, num_kv_heads)
    packed_rows = max_num_tokens * (num_heads // num_kv_heads)
    prefill_items = (
        packed_rows // PREFILL_ROWS
        + min(packed_rows // (DECODE_ROWS + 1), max_num_rows)
        + _num_prefill_chunks(num_sms, num_kv_heads)
    )
    num_items = max_num_rows + num_ranges + prefill_items
    return WORK_HEADER_WORDS + _round_up(num_ranges + 1, 16) + num_items * ITEM_WORDS


def workspace_words(num_kv_heads: int, head_dim: int, *, num_sms: int) -> int:
    """Number of float32 words of `workspace`; it does not depend on the step's size."""
    words = 0
    for num_ranges, rows in (
        (_num_decode_ranges(num_sms, num_kv_heads), DECODE_ROWS),
        (_num_prefill_chunks(num_sms, num_kv_heads), PREFILL_ROWS),
    ):
        buffers = 2 * num_ranges * num_kv_heads
        words += _round_up(buffers, 32) + buffers * rows * (head_dim + 2)
    return words


def allocate(
    max_num_tokens: int,
    max_num_rows: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> AttentionPlan:
    """Allocate a plan for the largest step.

    On the meta device it has the sizes for this machine's card, if there is one.
    """
    on_card = device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available())
    if on_card:
        index = device.index if device.type == "cuda" else None
        num_sms = torch.cuda.get_device_properties(index).multi_processor_count
    else:
        num_sms = MAX_SMS
    num_work_words = work_words(
        max_num_tokens, max_num_rows, num_heads=num_heads, num_kv_heads=num_kv_heads,
        num_sms=num_sms,
    )  # fmt: skip
    num_workspace_words = workspace_words(num_kv_heads, head_dim, num_sms=num_sms)
    return AttentionPlan(
        work=torch.zeros(num_work_words, dtype=torch.int32, device=device),
        workspace=torch.zeros(num_workspace_words, dtype=torch.float32, device=device),
    )


def _num_decode_ranges(num_sms: int, num_kv_heads: int) -> int:
    ranges = num_sms * MAX_DECODE_CTAS_PER_SM // num_kv_heads
    return min(max(ranges, 1), MAX_DECODE_RANGES)


def _num_prefill_chunks(num_sms: int, num_kv_heads: int) -> int:
    return -(-num_sms // num_kv_heads)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
