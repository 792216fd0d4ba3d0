"""Adapters in slots, and what the ops make of them: for the tests on a CPU and on a card."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyserve.ops import lora, reference

NAN = float("nan")


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


def run(case: Case, x: Tensor, starts: Tensor, out: Tensor) -> None:
    num_parts, max_rank = case.a.shape[1:3]
    shrunk = torch.full((len(x), num_parts, max_rank), NAN, device=x.device)
    lora.lora_shrink(x, case.a, starts, case.ranks, case.scales, shrunk)
    lora.lora_expand(shrunk, case.b, starts, case.ranks, case.columns, out)


def run_twin(case: Case, x: Tensor, starts: Tensor, out: Tensor) -> None:
    shrunk = torch.full((len(x), *case.a.shape[1:3]), NAN, device=x.device)
    reference.lora_shrink(x, case.a, starts, case.ranks, case.scales, shrunk)
    reference.lora_expand(shrunk, case.b, starts, case.ranks, case.columns, out)


def exactly(case: Case, x: Tensor, starts: Tensor, out: Tensor) -> Tensor:
    """By whole matrices, in float64: y + scale * x A^T B^T."""
    result = out.double()
    for slot, own in enumerate(case.ranks.tolist()):
        rows = slice(int(starts[slot]), int(starts[slot + 1]))
        for part, rank in enumerate(own):
            columns = slice(int(case.columns[part]), int(case.columns[part + 1]))
            a = case.a[slot, part, :rank].double()
            b = case.b[slot, columns, :rank].double()
            merged = float(case.scales[slot, part]) * (b @ a)
            result[rows, columns] += x[rows].double() @ merged.T
    return result
