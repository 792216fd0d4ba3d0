"""Sizes of an AttentionPlan, its constants against the header, and the twin of plan_attention."""

from __future__ import annotations

import re

import pytest
import torch

from pyserve import ops
from pyserve.ops import attention_plan, build, reference
from tests.ops import attention_plan_check as plans

MIXES = [
    [],
    [(0, 0)],
    [(1, 1), (0, 0), (1, 1000), (2, 0), (3, 64)],
    [(100, 100), (1, 65), (33, 500), (4, 128)],
    [(1, 7)] * 40,
]


@pytest.mark.parametrize("rows", MIXES)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (14, 2), (32, 1)])
@pytest.mark.parametrize("window", [0, 5, 64, 200])
def test_the_twin_covers_every_key_once(
    rows: list[tuple[int, int]], heads: tuple[int, int], window: int
) -> None:
    num_heads, num_kv_heads = heads
    num_tokens = sum(query_len for query_len, _ in rows)
    starts = torch.tensor([0] + [query_len for query_len, _ in rows]).cumsum(0).int()
    lens = torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32)
    words = attention_plan.work_words(
        num_tokens, len(rows), num_heads=num_heads, num_kv_heads=num_kv_heads, num_sms=4
    )
    work = torch.full((words,), -7, dtype=torch.int32)
    reference.plan_attention(starts, lens, num_heads, num_kv_heads, window, work)
    plans.check(plans.read(work), starts, lens, num_heads // num_kv_heads, window)


def test_the_twin_refuses_a_small_buffer() -> None:
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="40 words in 39"):
        reference.plan_attention(starts, lens, 2, 1, 0, torch.zeros(39, dtype=torch.int32))


def test_constants_are_those_of_the_header() -> None:
    header = (build.source_dir() / "gpu/attention/attention.h").read_text(encoding="utf-8")
    found = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+)[,;]", header)}
    assert found["DecodeRows"] == attention_plan.DECODE_ROWS
    assert found["PrefillRows"] == attention_plan.PREFILL_ROWS
    assert found["KvTile"] == attention_plan.KV_TILE
    assert found["WorkHeaderWords"] == attention_plan.WORK_HEADER_WORDS
    assert found["MaxDecodeCtasPerSm"] == attention_plan.MAX_DECODE_CTAS_PER_SM
    assert found["MaxDecodeRanges"] == attention_plan.MAX_DECODE_RANGES
    item = header[header.index("struct AttentionItem") :].split("};")[0]
    assert item.count("int32_t") == attention_plan.ITEM_WORDS


def test_sizes_by_hand() -> None:
    # 8 KV heads on 132 multiprocessors: 33 ranges, 17 chunks. 512 tokens of group 4 are at most 16
    # full query tiles and, in 64 rows, 64 rests.
    words = attention_plan.work_words(512, 64, num_heads=32, num_kv_heads=8, num_sms=132)
    assert words == 16 + 48 + 8 * (64 + 33 + 16 + 64 + 17)
    decode, prefill = 2 * 33 * 8, 2 * 17 * 8
    assert attention_plan.workspace_words(8, 128, num_sms=132) == (
        544 + decode * 16 * 130 + 288 + prefill * 128 * 130
    )
    assert [attention_plan.decode_query_len(heads, 2) for heads in (2, 14, 32, 34)] == [16, 2, 1, 0]


def test_allocate() -> None:
    plan = attention_plan.allocate(
        64, 8, num_heads=4, num_kv_heads=2, head_dim=64, device=torch.device("cpu")
    )
    assert isinstance(plan, ops.AttentionPlan)
    assert plan.work.dtype == torch.int32 and plan.workspace.dtype == torch.float32
    assert not plan.work.any() and not plan.workspace.any()
