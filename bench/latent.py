"""The ops of multi-head latent attention, for bench.ops and bench.gpu_ops: what is measured, its
bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_chains import Chain
from pyserve import ops
from pyserve.limits import CUDA_LATENT_SIZES
from pyserve.model.layers.latent_attention import num_tiles
from pyserve.ops import attention_plan, latent, reference_latent

BLOCK_SIZE = 16
EPS = 1e-6


class Sizes(NamedTuple):
    """Of a layer; DeepSeek's are 512, 64, 128."""

    num_heads: int
    latent_size: int
    rope_dim: int
    head_dim: int  # of the part of q that meets the latent, and of v

    @property
    def width(self) -> int:
        return self.latent_size + self.rope_dim


class Step:
    """Rows of (query_len, seq_len) over a cache of their own, whose blocks lie anywhere."""

    def __init__(
        self, sizes: Sizes, rows: Sequence[tuple[int, int]], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.sizes, self.rows = sizes, rows
        self.num_tokens = sum(query_len for query_len, _ in rows)
        blocks = [-(-seq_len // BLOCK_SIZE) for _, seq_len in rows]
        self.cache = randn(sum(blocks), BLOCK_SIZE, sizes.width)
        self.table = torch.zeros(len(rows), max(blocks), dtype=torch.int32, device=device)
        for row, ids in enumerate(torch.randperm(sum(blocks)).int().split(blocks)):
            self.table[row, : len(ids)] = ids
        starts = [0]
        for query_len, _ in rows:
            starts.append(starts[-1] + query_len)
        self.q = randn(self.num_tokens, sizes.num_heads, sizes.width)
        self.out = randn(self.num_tokens, sizes.num_heads, sizes.latent_size)
        self.inputs = (
            self.q, self.cache, self.table, ints(range(len(rows))), ints(starts),
            ints([seq_len for _, seq_len in rows]),
        )  # fmt: skip

    def plan(self) -> ops.AttentionPlan:
        num_heads = self.sizes.num_heads
        plan = attention_plan.allocate(
            self.num_tokens, len(self.rows), num_heads=num_heads,
            num_kv_heads=num_tiles(num_heads), head_dim=self.sizes.latent_size,
            device=self.q.device,
        )  # fmt: skip
        ops.plan_attention(
            self.inputs[4], self.inputs[5], plan, num_heads=num_heads,
            num_kv_heads=num_tiles(num_heads),
        )  # fmt: skip
        return plan

    def attend(self, plan: ops.AttentionPlan) -> None:
        longest = max(query_len for query_len, _ in self.rows)
        latent.latent_attention(
            *self.inputs, softmax_scale=0.1, out=self.out, plan=plan, max_query_len=longest
        )

    @property
    def num_bytes(self) -> int:
        """What attention must move."""
        kept = self.sizes.width * self.cache.element_size()
        return sum(seq_len for _, seq_len in self.rows) * kept + self.q.nbytes + self.out.nbytes

    @property
    def num_flops(self) -> int:
        pairs = sum(n * (2 * length - n + 1) // 2 for n, length in self.rows)
        return 2 * pairs * self.sizes.num_heads * (self.sizes.width + self.sizes.latent_size)


# By name: heads of GLM-4.7-Flash, DeepSeek-V2-Lite and DeepSeek-V3, and rows of a step.
CARD_HEADS = {"20 heads": 20, "16 heads": 16, "128 heads": 128}
CARD_LOADS = {
    "decode 1 x 8k": [(1, 8192)],
    "decode 8 x 32k": [(1, 32768)] * 8,
    "decode 64 x 2k": [(1, 2048)] * 64,
    "prefill 2k": [(2048, 2048)],
}
READ_TARGET = ("%", 75.0)  # of what decode of 8 x 32k must read


def chains(device: torch.device) -> Iterator[Chain]:
    """Attention by a plan that is made once, as a step's layers share it; and the products around
    it of one row."""
    for heads, num_heads in CARD_HEADS.items():
        sizes = Sizes(num_heads, *CUDA_LATENT_SIZES, 128)
        for load, rows in CARD_LOADS.items():
            step = Step(sizes, rows, torch.bfloat16, device)
            target = READ_TARGET if load == "decode 8 x 32k" and num_heads == 16 else None
            size = step.num_bytes, step.num_flops
            run = partial(step.attend, step.plan())
            yield Chain("latent_attention", f"{load}, {heads}", [run], *size, target)
        weights = torch.randn(num_heads, 512, 128, dtype=torch.bfloat16, device=device)
        x = torch.randn(1, num_heads, 128, dtype=torch.bfloat16, device=device)
        out = torch.empty(1, num_heads, 512, dtype=torch.bfloat16, device=device)
        size = weights.nbytes, 2 * weights.numel()
        product = partial(latent.batched_linear, x, weights, out)
        yield Chain("batched_linear", f"1 row, {heads}", [product], *size)
        op, load, run, _, num_bytes = _rope_case(sizes, Step(sizes, [(1, 1)] * 8, x.dtype, device))
        yield Chain(op, f"{load}, {heads}", [run], num_bytes, 0)


def cpu_cases(
    sizes: Sizes, loads: dict[str, list[tuple[int, int]]], dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """(op, load, run, twin, bytes, operations, dtype) by the name of a load and its rows."""
    cpu = torch.device("cpu")
    for load, rows in loads.items():
        step = Step(sizes, rows, dtype, cpu)
        twin: Callable[[], object] = partial(
            reference_latent.latent_attention, *step.inputs, 0.1, step.num_tokens, None, None,
            step.out,
        )  # fmt: skip
        run = partial(latent.latent_attention, *step.inputs, softmax_scale=0.1, out=step.out)
        size = step.num_bytes, step.num_flops, torch.float32
        yield "latent_attention", f"{load}, {sizes.num_heads} heads", run, twin, *size
        yield _batched_case(sizes, step, dtype)
        yield _rope_case(sizes, step)


def _batched_case(sizes: Sizes, step: Step, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = torch.randn(sizes.num_heads, sizes.head_dim, sizes.latent_size).to(dtype)
    heads = torch.empty(step.num_tokens, sizes.num_heads, sizes.head_dim, dtype=dtype)
    arguments = step.out, weight, heads
    load = f"{step.num_tokens} x {sizes.num_heads} x [{sizes.head_dim}, {sizes.latent_size}]"
    return (
        "batched_linear", load, partial(latent.batched_linear, *arguments),
        partial(reference_latent.batched_linear, *arguments),
        weight.nbytes + heads.nbytes + step.out.nbytes, 2 * step.num_tokens * weight.numel(), dtype,
    )  # fmt: skip


def _rope_case(sizes: Sizes, step: Step) -> tuple[Any, ...]:
    n, like = step.num_tokens, step.q
    q = torch.randn(n, sizes.num_heads, sizes.rope_dim).to(like)
    compressed = torch.randn(n, sizes.width).to(like)
    angles = torch.rand(n, sizes.rope_dim // 2, device=like.device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    positions = torch.arange(n, dtype=torch.int32, device=like.device)
    where = positions, cos_sin, torch.randperm(n, device=like.device)
    cache = like.new_zeros(-(-n // BLOCK_SIZE), BLOCK_SIZE, sizes.width)
    norm, rotated = like.new_ones(sizes.latent_size), like[..., sizes.latent_size :]
    run = partial(
        latent.rope_write_latent, q, compressed, *where, norm, cache, rotated, eps=EPS,
        has_pairs=True,
    )  # fmt: skip
    twin = partial(
        reference_latent.rope_write_latent, q, compressed, *where, norm, EPS, True, rotated, cache
    )
    num_bytes = 2 * q.nbytes + 2 * compressed.nbytes + cos_sin.nbytes
    return "rope_write_latent", f"{n} x ({sizes.num_heads} + 1)", run, twin, num_bytes
