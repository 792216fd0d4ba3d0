"""The ops on quantised matrices, for bench.ops on a CPU and, those of 8-bit floats, on a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench import experts
from bench.gpu_chains import Chain
from bench.w4a16 import HEAD, SLICE_BYTES, random_packed
from pyserve import ops
from pyserve.ops import fp8, quantised, reference

CPU = torch.device("cpu")
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
OWN_ROWS = 32  # at which the kernel of the floats is measured, whatever a step would take


def cpu_cases(
    matrices: Sequence[tuple[int, int]], num_tokens: int, dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """(op, load, run, twin, bytes, operations, dtype) of matrices (k, n). The twin of a product is
    `ops.linear` of the matrix as plain numbers of `dtype`."""
    for k, n in matrices:
        yield from _of_matrix("w4a16", quantised.W4A16Matrix(random_packed(n, k, CPU)), k, n,
                              num_tokens, dtype)  # fmt: skip
        yield from _of_matrix("fp8", random_fp8(n, k, CPU), k, n, num_tokens, dtype)


def random_fp8(n: int, k: int, device: torch.device) -> quantised.Fp8Matrix:
    """With a scale for 128 by 128."""
    weight = torch.empty(n, k, dtype=fp8.E4M3, device=device)
    scale = 0.02 * fp8.fill_with_noise(weight, torch.Generator(device).manual_seed(n))
    scales = torch.full((-(-n // 128), -(-k // 128)), scale, device=device)
    return quantised.Fp8Matrix(weight.view(torch.uint8), scales, 128, 128)


def fp8_products(
    matrices: Mapping[str, tuple[int, int]], device: torch.device,
    num_sets: Callable[[int], int], rows: Sequence[int] = ROWS,
) -> Iterator[Chain]:  # fmt: skip
    """Each matrix [n, k] of 8-bit floats by so many rows, in bfloat16: as `ops` has it done, and by
    the kernel of the floats. And a slice of it made plain numbers; and as the only expert."""
    for name, (n, k) in matrices.items():
        if name == HEAD:
            continue
        first = random_fp8(n, k, device)
        made = [first, *(random_fp8(n, k, device) for _ in range(num_sets(first.nbytes) - 1))]
        num_rows = quantised.scratch_rows(first, n, k, SLICE_BYTES // 2)
        num_rows = min(n, num_rows)
        scratch = torch.empty(max(num_rows, 128) * k, dtype=torch.bfloat16, device=device)
        plain = scratch[: num_rows * k].view(num_rows, k)
        runs: list[Callable[[], object]] = [partial(it.dequantise, 0, plain) for it in made]
        num_bytes = num_rows * k + plain.nbytes
        yield Chain("dequantise_fp8", f"{num_rows} x {k} ({name})", runs, num_bytes, 0)
        for m in rows:
            x = torch.randn(m, k, device=device).bfloat16()
            out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
            load = f"{m} x {k} -> {n} ({name})"
            size = first.nbytes + x.nbytes + out.nbytes, 2 * m * n * k
            runs = [partial(quantised.linear, x, it, None, out, scratch) for it in made]
            yield Chain("linear_fp8", load, runs, *size)
            if m > OWN_ROWS:
                continue
            runs = [partial(it.multiply, x, None, out, ops.STORE) for it in made]
            yield Chain("own linear_fp8", load, runs, *size)
            offsets = torch.tensor([0, m], dtype=torch.int32, device=device)
            stacked = [as_expert(it) for it in made]
            runs = [partial(it.multiply_grouped, x, None, offsets, m, None, out) for it in stacked]
            yield Chain("grouped_linear_fp8", load, runs, *size)


def fp8_experts(device: torch.device) -> Iterator[Chain]:
    """The products of a mixture whose experts are 8-bit floats, in bfloat16."""
    layer = experts.LAYERS[experts.ALL_READ]

    def stacked(n: int, k: int) -> quantised.Fp8Matrix:
        each = [random_fp8(n, k, device) for _ in range(layer.num_experts)]
        weight, scales = (
            torch.stack(parts) for parts in zip(*(it[:2] for it in each), strict=True)
        )
        return each[0]._replace(weight=weight, scales=scales)

    gate_up, down = stacked(2 * layer.size, layer.hidden), stacked(layer.hidden, layer.size)
    scratch = torch.empty(128 * max(layer.hidden, layer.size), dtype=torch.bfloat16, device=device)
    for num_tokens in layer.tokens:
        mixture = experts.Mixture(layer, num_tokens, torch.bfloat16, device)
        x = mixture.tokens()
        routing = mixture.routing(x)
        num_read = int((routing.offsets.diff() > 0).sum())
        num_rows = num_tokens * layer.top_k
        first = partial(quantised.grouped_linear_silu_mul, x, gate_up, routing, mixture.activated,
                        mixture.rows, scratch)  # fmt: skip
        second = partial(
            quantised.grouped_linear, mixture.activated, down, routing, mixture.rows, scratch
        )
        flops = 2 * num_rows * layer.size * layer.hidden
        moved = 2 * num_rows * (layer.size + layer.hidden)
        for name, run, matrix, share in (("gate_up", first, gate_up, 2), ("down", second, down, 1)):
            num_bytes = matrix.nbytes * num_read // layer.num_experts + moved
            load = f"{num_tokens} tokens, {experts.ALL_READ} {name}"
            yield Chain("grouped_linear_fp8", load, [run], num_bytes, share * flops)


def as_expert(matrix: quantised.Fp8Matrix) -> quantised.Fp8Matrix:
    """As the only one."""
    return matrix._replace(weight=matrix.weight[None], scales=matrix.scales[None])


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
        grouped = as_expert(matrix).multiply_grouped
    yield (
        f"grouped_linear_{kind}",
        f"{load}, one expert",
        partial(grouped, x, None, all_rows, num_tokens, None, out),
        twin,
        *size,
        dtype,
    )
