"""Attention on a card for bench.gpu_ops: rows of any lengths, heads of any kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_chains import BLOCK_SIZE, Chain
from pyserve import ops
from pyserve.ops import attention_plan


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one layer; `name` is the model's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    softcap: float = 0.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of (query_len, seq_len), and what says so on the card."""

    starts: Tensor
    seq_lens: Tensor
    num_tokens: int
    max_query_len: int
    plan: ops.AttentionPlan
    heads: Heads

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]], heads: Heads, device: torch.device) -> Rows:
        query_lens = [query_len for query_len, _ in rows]
        plan = attention_plan.allocate(
            sum(query_lens), len(rows), num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, device=device,
        )  # fmt: skip
        starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32)
        seq_lens = torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32)
        made = cls(
            starts.to(device), seq_lens.to(device), sum(query_lens), max(query_lens), plan, heads
        )
        made.plan_attention()
        return made

    def plan_attention(self) -> None:
        ops.plan_attention(
            self.starts, self.seq_lens, self.plan, num_heads=self.heads.num_heads,
            num_kv_heads=self.heads.num_kv_heads,
        )  # fmt: skip


def attention_chain(
    heads: Heads, load: str, rows: Sequence[tuple[int, int]],
    target: tuple[str, float] | None = None, *, device: torch.device,
    num_sets: Callable[[int], int], has_rope: bool = False,
) -> Chain:  # fmt: skip
    """has_rope: the op that does rope_write_kv's work too, for rows of decode."""
    made, head_dim = Rows.of(rows, heads, device), heads.head_dim
    blocks = [-(-seq_len // BLOCK_SIZE) for _, seq_len in rows]
    num_kv = sum(seq_len for _, seq_len in rows)
    num_vectors = 2 * num_kv * heads.num_kv_heads + 2 * made.num_tokens * heads.num_heads
    num_bytes = num_vectors * head_dim * 2
    slots = torch.arange(len(rows), dtype=torch.int32, device=device)
    cos_sin = torch.ones(max(length for _, length in rows), head_dim, device=device)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    runs: list[Callable[[], object]] = []
    for _ in range(num_sets(num_bytes)):
        table = torch.zeros(len(rows), max(blocks), dtype=torch.int32, device=device)
        ids = torch.randperm(sum(blocks), device=device).int()
        for row, part in enumerate(ids.split(blocks)):
            table[row, : len(part)] = part
        qkv = randn(made.num_tokens, heads.num_heads + 2 * heads.num_kv_heads, head_dim)
        caches = [randn(sum(blocks), BLOCK_SIZE, heads.num_kv_heads, head_dim) for _ in range(2)]
        q = qkv[:, : heads.num_heads]
        op = partial(ops.paged_attention, q, max_query_len=made.max_query_len)
        if has_rope:
            op = partial(ops.rope_attention, q, qkv.flatten(1), cos_sin)
        rest = (*caches, table, slots, made.starts, made.seq_lens)
        options = {"softmax_scale": head_dim**-0.5, "softcap": heads.softcap}
        runs.append(partial(op, *rest, plan=made.plan, **options))
    pairs = sum(n * (2 * length - n + 1) // 2 for n, length in rows)  # visible (query, key)
    name = "rope_attention" if has_rope else "attention"
    return Chain(name, load, runs, num_bytes, 4 * pairs * heads.num_heads * head_dim, target)
