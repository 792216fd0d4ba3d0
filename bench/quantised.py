"""The ops on quantised matrices on a CPU, for bench.ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.w4a16 import random_packed
from pyserve import ops
from pyserve.ops import fp8, quantised, reference

CPU = torch.device("cpu")


def cpu_cases(
    matrices: Sequence[tuple[int, int]], num_tokens: int, dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """(op, load, run, twin, bytes, operations, dtype) of matrices (k, n). The twin of a product is
    `ops.linear` of the matrix as plain numbers of `dtype`."""
    for k, n in matrices:
        yield from _of_matrix("w4a16", quantised.W4A16Matrix(random_packed(n, k, CPU)), k, n,
                              num_tokens, dtype)  # fmt: skip
        yield from _of_matrix("fp8", random_fp8(n, k), k, n, num_tokens, dtype)


def random_fp8(n: int, k: int, *count: int) -> quantised.Fp8Matrix:
    """With a scale for 128 by 128; of `count` matrices where that is given."""
    weight = torch.empty(*count, n, k, dtype=fp8.E4M3)
    scale = 0.02 * fp8.fill_with_noise(weight, None)
    scales = torch.full((*count, -(-n // 128), -(-k // 128)), scale)
    return quantised.Fp8Matrix(weight.view(torch.uint8), scales, 128, 128)


def _of_matrix(
    kind: str, matrix: quantised.W4A16Matrix | quantised.Fp8Matrix, k: int, n: int,
    num_tokens: int, dtype: torch.dtype,
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    x, weight = torch.randn(num_tokens, k).to(dtype), torch.empty(n, k, dtype=dtype)
    out = torch.empty(num_tokens, n, dtype=dtype)
    scratch = torch.empty(max(128 * k, 2**22 // x.element_size()), dtype=dtype)
    size = matrix.nbytes + x.nbytes + out.nbytes, 2 * num_tokens * n * k
    load, twin = f"{num_tokens} x {k} -> {n}", partial(ops.linear, x, weight, None, out)
    all_rows = torch.tensor([0, num_tokens], dtype=torch.int32)
    run = partial(quantised.linear, x, matrix, None, out, scratch)
    yield f"linear_{kind}", load, run, twin, *size, dtype
    twin_of_weight = getattr(reference, f"dequantise_{kind}")
    yield (
        f"dequantise_{kind}",
        f"{n} x {k}",
        partial(quantised.dequantise, matrix, weight),
        partial(twin_of_weight, *matrix, weight),
        matrix.nbytes + weight.nbytes,
    )
    if isinstance(matrix, quantised.W4A16Matrix):
        grouped = matrix._replace(packed=matrix.packed[None]).multiply_grouped
    else:
        stacked = matrix._replace(weight=matrix.weight[None], scales=matrix.scales[None])
        grouped = stacked.multiply_grouped
    yield (
        f"grouped_linear_{kind}",
        f"{load}, one expert",
        partial(grouped, x, None, all_rows, num_tokens, out),
        twin,
        *size,
        dtype,
    )
