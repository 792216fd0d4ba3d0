"""Adapters in slots, and what the ops make of them: for the tests on a CPU and on a card."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyserve.ops import lora, reference

NAN, EPS = float("nan"), 1e-5


class Case(NamedTuple):
    """Adapters in slots; what no op may read is NaN."""

    a: Tensor
    b: Tensor
    ranks: Tensor
    scales: Tensor
    columns: Tensor


def make_case(
    ranks: list[list[int]], sizes: list[int], k: int, max_rank: int, dtype: torch.dtype,
    device: str = "cpu",
) -> Case:  # fmt: skip
    num_slots, num_parts = len(ranks), len(sizes)
    bounds = [sum(sizes[:part]) for part in range(num_parts + 1)]
    a = torch.full((num_slots, num_parts, max_rank, k), NAN, dtype=dtype)
    b = torch.full((num_slots, bounds[-1], max_rank), NAN, dtype=dtype)
    for slot, own in enumerate(ranks):
        for part, rank in enumerate(own):
            a[slot, part, :rank] = torch.randn(rank, k) / k**0.5
            b[slot, bounds[part] : bounds[part + 1], :rank] = torch.randn(sizes[part], rank)
    case = Case(
        a,
        b,
        torch.tensor(ranks, dtype=torch.int32),
        torch.rand(num_slots, num_parts) + 0.5,
        torch.tensor(bounds, dtype=torch.int32),
    )
    return Case(*(tensor.to(device) for tensor in case))


def starts_of(*lengths: int) -> Tensor:
    """Tokens without an adapter, then those of each slot."""
    bounds = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return torch.tensor(bounds, dtype=torch.int32)


def run(
    case: Case, x: Tensor, starts: Tensor, out: Tensor, *, activated: Tensor | None = None,
    x_squares: Tensor | None = None, num_splits: int | None = None, ops: ModuleType = lora,
) -> None:  # fmt: skip
    """What the adapters add to out; with `activated` silu_mul of that. `ops`: or their twins."""
    num_splits = num_splits or lora.num_splits(len(x), x.device)
    shrunk = torch.full((num_splits, len(x), *case.a.shape[1:3]), NAN, device=x.device)
    ops.lora_shrink(x, case.a, starts, case.ranks, case.scales, shrunk, x_squares, EPS)
    rest = shrunk, case.b, starts, case.ranks, case.columns, out
    if activated is None:
        ops.lora_expand(*rest)
    else:
        ops.lora_expand_silu_mul(*rest, activated)


def run_twin(
    case: Case, x: Tensor, starts: Tensor, out: Tensor, *, activated: Tensor | None = None,
    x_squares: Tensor | None = None,
) -> None:  # fmt: skip
    run(case, x, starts, out, activated=activated, x_squares=x_squares, ops=reference)


def squares_of(x: Tensor) -> Tensor:
    """As ops.linear_add_for_norm's, of a residual stream that is not x."""
    num_squares = -(-x.shape[1] // 16)
    return torch.rand(len(x), num_squares, device=x.device) * 90 + 1


def exactly(
    case: Case, x: Tensor, starts: Tensor, out: Tensor, x_squares: Tensor | None = None
) -> Tensor:
    """By whole matrices, in float64: y + scale * x A^T B^T."""
    result, x = out.double(), x.double()
    if x_squares is not None:
        x = x / (x_squares.double().sum(1, keepdim=True) / x.shape[1] + EPS).sqrt()
    for slot, own in enumerate(case.ranks.tolist()):
        rows = slice(int(starts[slot]), int(starts[slot + 1]))
        for part, rank in enumerate(own):
            columns = slice(int(case.columns[part]), int(case.columns[part + 1]))
            a = case.a[slot, part, :rank].double()
            b = case.b[slot, columns, :rank].double()
            merged = float(case.scales[slot, part]) * (b @ a)
            result[rows, columns] += x[rows] @ merged.T
    return result
