"""Chains of ops as a step has them, one case a decoder layer: what bench.gpu_ops measures beside
single ops, for a kernel may start, and ask for its weights, while the one before it runs.

Every layer has weights and caches of its own; a floor counts those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import attention_plan

NUM_LAYERS = 6  # in turn: of their weights the L2 cache keeps nothing
BLOCK_SIZE = 16
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Chain:
    """One layer's ops: `runs` do the same with the weights of different layers; `target` is that of
    gpu_ops.Case."""

    name: str
    load: str
    runs: list[Callable[[], object]]
    num_bytes: int
    num_flops: int
    target: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder layer's sizes, and where its tensors lie."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def q(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """qkv, o, gate_up, down."""
        return [
            (self.qkv, self.hidden), (self.hidden, self.q), (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]  # fmt: skip

    @property
    def num_weights(self) -> int:
        return sum(n * k for n, k in self.matrices)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device).mul_(scale)

    def weights(self) -> list[list[Tensor]]:
        """Of NUM_LAYERS layers."""
        return [
            [self.randn(n, k, scale=k**-0.5) for n, k in self.matrices] for _ in range(NUM_LAYERS)
        ]


class Step:
    """The activations of `num_rows` rows of one token, the last of `context`, and their plan."""

    def __init__(self, shape: Shape, num_rows: int, context: int) -> None:
        self.x, self.y, self.residual = (shape.randn(num_rows, shape.hidden) for _ in range(3))
        self.qkv = shape.randn(num_rows, shape.qkv)
        self.gate_up = shape.randn(num_rows, 2 * shape.intermediate)
        self.act = shape.randn(num_rows, shape.intermediate)
        self.q = self.qkv[:, : shape.q].view(num_rows, shape.num_heads, shape.head_dim)
        self.joined = shape.randn(num_rows, shape.q)
        self.heads = self.joined.view(self.q.shape)
        angles = torch.rand(context, shape.head_dim // 2, device=shape.device)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
        blocks_per_row = -(-context // BLOCK_SIZE)
        self.num_blocks = num_rows * blocks_per_row
        ids = torch.randperm(self.num_blocks, device=shape.device).int()
        self.block_table = ids.view(num_rows, blocks_per_row)
        slots = torch.arange(num_rows + 1, dtype=torch.int32, device=shape.device)
        self.slots, self.starts = slots[:num_rows], slots
        self.seq_lens = torch.full_like(self.slots, context)
        heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
        self.plan = attention_plan.allocate(
            num_rows, num_rows, head_dim=shape.head_dim, device=shape.device, **heads
        )
        ops.plan_attention(self.starts, self.seq_lens, self.plan, **heads)

    def linears(self, weights: list[Tensor]) -> None:
        """The four matrices of a layer, each on what the one before gave."""
        ops.linear(self.x, weights[0], out=self.qkv)
        ops.linear(self.qkv[:, : self.joined.shape[1]], weights[1], out=self.y)
        ops.linear(self.y, weights[2], out=self.gate_up)
        ops.linear(self.gate_up[:, : self.act.shape[1]], weights[3], out=self.x)

    def layer(
        self, weights: list[Tensor], norms: tuple[Tensor, Tensor], caches: tuple[Tensor, Tensor]
    ) -> None:
        """What a decoder layer does in a decode step."""
        ops.linear(self.x, weights[0], out=self.qkv)
        ops.rope_attention(
            self.q, self.qkv, self.cos_sin, *caches, self.block_table, self.slots, self.starts,
            self.seq_lens, softmax_scale=self.q.shape[2] ** -0.5, plan=self.plan, out=self.heads,
        )  # fmt: skip
        ops.linear_add(self.joined, weights[1], None, self.residual)
        ops.rms_norm(self.residual, norms[0], EPS, self.x)
        ops.linear_silu_mul(self.x, weights[2], None, self.act, self.gate_up)
        ops.linear_add(self.act, weights[3], None, self.residual)
        ops.rms_norm(self.residual, norms[1], EPS, self.x)


def linear_chains(shape: Shape, numbers_of_rows: Sequence[int]) -> Iterator[Chain]:
    """The matrices of a layer alone."""
    layers = shape.weights()
    for num_rows in numbers_of_rows:
        step = Step(shape, num_rows, 1)
        yield Chain(
            name="linear chain",
            load=f"{num_rows} rows, {len(shape.matrices)} matrices",
            runs=[partial(step.linears, weights) for weights in layers],
            num_bytes=2 * shape.num_weights,
            num_flops=2 * num_rows * shape.num_weights,
        )


def layer_chains(shape: Shape, loads: Sequence[tuple[int, int]]) -> Iterator[Chain]:
    """A whole layer of a decode step, by (rows, context)."""
    layers = shape.weights()
    for num_rows, context in loads:
        step = Step(shape, num_rows, context)
        cache = step.num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim
        norms = shape.randn(shape.hidden), shape.randn(shape.hidden)
        num_scores = num_rows * context * shape.q
        yield Chain(
            name="layer",
            load=f"{num_rows} rows, context {context}",
            runs=[
                partial(step.layer, weights, norms, (shape.randn(*cache), shape.randn(*cache)))
                for weights in layers
            ],
            num_bytes=2 * shape.num_weights
            + 4 * num_rows * context * shape.num_kv_heads * shape.head_dim,
            num_flops=2 * num_rows * shape.num_weights + 4 * num_scores,
        )
