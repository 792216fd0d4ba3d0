"""What a plan of plan_attention must satisfy, whoever made it; and its items, to look at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyserve.ops import attention_plan as sizes


@dataclass(frozen=True)
class Item:
    """AttentionItem of cuda/gpu/attention/attention.h."""

    row: int
    query_tile: int
    kv_begin: int
    kv_end: int
    num_splits: int
    split: int
    first_item: int
    partial: int

    @property
    def num_tiles(self) -> int:
        return -(-(self.kv_end - self.kv_begin) // sizes.KV_TILE)


@dataclass(frozen=True)
class Plan:
    ranges: list[list[Item]]  # decode items of each range
    prefill: list[Item]

    @property
    def decode(self) -> list[Item]:
        return [item for items in self.ranges for item in items]


def read(work: Tensor) -> Plan:
    words = work.tolist()
    num_decode, num_prefill, starts_at, decode_at, prefill_at, num_ranges = words[:6]

    def items(at: int, count: int) -> list[Item]:
        size = sizes.ITEM_WORDS
        return [Item(*words[at + i * size : at + (i + 1) * size]) for i in range(count)]

    starts = words[starts_at : starts_at + num_ranges + 1]
    assert starts[0] == 0 and starts[-1] == num_decode and starts == sorted(starts)
    decode = items(decode_at, num_decode)
    ranges = [decode[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    return Plan(ranges=ranges, prefill=items(prefill_at, num_prefill))


def check(plan: Plan, cu_seqlens_q: Tensor, seq_lens: Tensor, group: int, window: int) -> None:
    """Every key that a query tile sees is in exactly one item, in order; partials are distinct."""
    starts, lens = cu_seqlens_q.tolist(), seq_lens.tolist()
    expected: list[dict[tuple[int, int], tuple[int, int]]] = [{}, {}]
    for row, seq_len in enumerate(lens):
        query_len = starts[row + 1] - starts[row]
        num_packed, position = query_len * group, seq_len - query_len
        if num_packed == 0 or seq_len == 0:
            continue
        is_prefill = num_packed > sizes.DECODE_ROWS
        rows = sizes.PREFILL_ROWS if is_prefill else sizes.DECODE_ROWS
        for tile, first in enumerate(range(0, num_packed, rows)):
            last = min(first + rows, num_packed) - 1
            low = max(0, position + first // group - window + 1) if window else 0
            keys = (low // sizes.KV_TILE * sizes.KV_TILE, position + last // group + 1)
            expected[is_prefill][row, tile] = keys
    for items, wanted in ((plan.decode, expected[0]), (plan.prefill, expected[1])):
        found: dict[tuple[int, int], list[Item]] = {}
        for index, item in enumerate(items):
            parts = found.setdefault((item.row, item.query_tile), [])
            assert item.kv_begin % sizes.KV_TILE == 0 and item.kv_begin < item.kv_end
            assert item.split == len(parts) and item.first_item + item.split == index
            if parts:
                assert parts[-1].kv_end == item.kv_begin
                assert item.partial == parts[-1].partial + 1
            parts.append(item)
        assert found.keys() == wanted.keys()
        for key, parts in found.items():
            assert (parts[0].kv_begin, parts[-1].kv_end) == wanted[key]
            assert {part.num_splits for part in parts} == {len(parts)}
            assert (parts[0].partial == -1) == (len(parts) == 1)
        partials = [item.partial for item in items if item.partial >= 0]
        assert len(set(partials)) == len(partials)
