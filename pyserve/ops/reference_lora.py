"""Plain-torch twins of the ops of lora.py; see reference.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyserve.ops import w4a16
from pyserve.ops.reference_linear import leave_norm, silu_mul


def lora_shrink(
    x: Tensor, a: Tensor, starts: Tensor, ranks: Tensor, scales: Tensor, out: Tensor,
    x_squares: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """The sum of out over its splits = scale * x a^T, for each slot's tokens and each part."""
    factors = None
    if x_squares is not None:
        factors = torch.rsqrt(x_squares.sum(1, keepdim=True) / x.shape[1] + eps)
    for slot, part, rank, begin, end in _segments(starts, ranks, len(x), a.shape[2]):
        product = x[begin:end].float() @ a[slot, part, :rank].float().T * scales[slot, part]
        if factors is not None:
            product *= factors[begin:end]
        out[0, begin:end, part, :rank] = product
        out[1:, begin:end, part, :rank] = 0.0


def lora_expand(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, out: Tensor
) -> None:
    """out += shrunk b^T for each slot's tokens, in each part's columns; rounded once."""
    bounds = columns.tolist()
    for slot, part, rank, begin, end in _segments(starts, ranks, len(out), b.shape[2]):
        first, last = bounds[part : part + 2]
        _check(0 <= first <= last <= out.shape[1], f"part {part} has columns {first} to {last}")
        own = out[begin:end, first:last]
        added = shrunk[:, begin:end, part, :rank].sum(0) @ b[slot, first:last, :rank].float().T
        own.copy_(own.float() + added)


def lora_expand_silu_mul(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, gate_up: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """lora_expand into gate_up, which rounds, then silu(gate) * up."""
    lora_expand(shrunk, b, starts, ranks, columns, gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def linear_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, shrunk: Tensor,
    b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, x_squares: Tensor | None = None,
    eps: float = 0.0, norm_weight: Tensor | None = None, scaled: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:  # fmt: skip
    """linear, or linear_w4a16 where weight is int32, with lora_expand added to its sums; rounded
    once. epilogue 0 stores, 1 is that of linear_add, 2 that of linear_silu_mul."""
    if weight.dtype == torch.int32:
        weight = w4a16.dequantised(weight, b.shape[1], x.shape[1])
    result = x.float() @ weight.float().T
    lora_expand(shrunk, b, starts, ranks, columns, result)
    if x_squares is not None:
        result *= torch.rsqrt(x_squares.sum(1, keepdim=True) / x.shape[1] + eps)
    if bias is not None:
        result += bias.float()
    if epilogue == 2:
        silu_mul(result, out)
    else:
        out.copy_(result if epilogue == 0 else out.float() + result)
    if norm_weight is not None:
        assert scaled is not None and squares is not None
        leave_norm(out, norm_weight, scaled, squares)


def serves_linear_lora(x: Tensor, *_: object) -> bool:
    """As serves_linear."""
    return True


def _segments(
    starts: Tensor, ranks: Tensor, num_tokens: int, max_rank: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (slot, part, its rank, first token, end) for each slot with tokens and part with a
    pair. Raises RuntimeError for values out of range."""
    bounds = starts.tolist()
    for slot, own in enumerate(ranks.tolist()):
        begin, end = bounds[slot : slot + 2]
        _check(0 <= begin <= end <= num_tokens, f"slot {slot} has tokens {begin} to {end}")
        for part, rank in enumerate(own):
            _check(0 <= rank <= max_rank, f"ranks[{slot}, {part}] is {rank}")
            if rank and end > begin:
                yield slot, part, rank, begin, end


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"lora: {what}")
