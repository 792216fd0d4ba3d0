"""8-bit floats by rows rounded to them, for bench.ops on a card with matrix units of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu_chains import Chain
from bench.quantised import random_fp8
from bench.w4a16 import GATE_UP, HEAD
from pyserve.model.quantised_scheme import SCRATCH_BYTES
from pyserve.ops import SILU_MUL, STORE, quantised

ROWS = (9, 17, 32, 64, 128, 256, 512, 1024, 2048, 8192)
TILED_ROWS = (17, 64, 128, 256, 512, 2048)
# Rows of x, columns, mates and parts: kW8Tilings in cuda/gpu/linear/gemm_w8a8_sm90a.cu.
TILINGS = (
    (64, 64, 1, 1), (64, 64, 1, 2), (64, 128, 1, 1), (64, 128, 1, 2), (128, 64, 1, 1),
    (128, 128, 1, 1), (128, 128, 2, 1), (256, 128, 1, 1), (256, 128, 2, 1),
)  # fmt: skip


def products(
    matrices: Mapping[str, tuple[int, int]], device: torch.device,
    num_sets: Callable[[int], int], rows: Sequence[int] = ROWS,
) -> Iterator[Chain]:  # fmt: skip
    """Each matrix [n, k] by so many rows, in bfloat16: with x rounded, as `ops` has it done, and by
    cuBLAS of a matrix of 16 bits. Of gate and up with silu_mul in the kernel too."""
    for name, (n, k) in matrices.items():
        if name == HEAD:
            continue
        made = _made(n, k, device, num_sets)
        count = num_sets(2 * n * k)
        plain = [torch.randn(n, k, device=device).bfloat16() for _ in range(count)]
        scratch = _scratch(k, device)
        for m in rows:
            x, out = _rows(m, n, k, device)
            load = f"{m} x {k} -> {n} ({name})"
            moved, flops = x.nbytes + out.nbytes, 2 * m * n * k
            runs: list[Callable[[], object]] = [
                partial(multiply, x, it, out, scratch) for it in made
            ]
            yield Chain("linear_w8a8", load, runs, made[0].nbytes + moved, flops)
            if name == GATE_UP:
                half = torch.empty(m, n // 2, dtype=torch.bfloat16, device=device)
                runs = [partial(multiply, x, it, half, scratch, SILU_MUL) for it in made]
                size = made[0].nbytes + x.nbytes + half.nbytes
                yield Chain("linear_w8a8 and silu_mul", load, runs, size, flops)
            runs = [partial(quantised.linear, x, it, None, out, scratch) for it in made]
            yield Chain("linear_fp8", load, runs, made[0].nbytes + moved, flops)
            runs = [partial(functional.linear, x, it) for it in plain]
            yield Chain("cuBLAS of 16 bits", load, runs, plain[0].nbytes + moved, flops)


def tilings(
    matrices: Mapping[str, tuple[int, int]], device: torch.device,
    num_sets: Callable[[int], int], rows: Sequence[int] = TILED_ROWS,
) -> Iterator[Chain]:  # fmt: skip
    """Each tiling: which is chosen is an estimate."""
    for name, (n, k) in matrices.items():
        if name == HEAD:
            continue
        made, scratch = _made(n, k, device, num_sets), _scratch(k, device)
        for m in rows:
            x, out = _rows(m, n, k, device)
            num_bytes = made[0].nbytes + x.nbytes + out.nbytes
            for number, (tile_rows, columns, mates, parts) in enumerate(TILINGS, 1):
                if tile_rows >= 4 * max(m, 64) or (parts > 1 and m > 256):
                    continue
                runs: list[Callable[[], object]] = [
                    partial(tiled, number, x, it, out, scratch) for it in made
                ]
                tile = f"{tile_rows} x {columns}, {mates} mates, {parts} parts"
                load = f"{m} x {k} -> {n} ({name}), {tile}"
                yield Chain(f"8-bit tiling {number}", load, runs, num_bytes, 2 * m * n * k)
        switch(made[0].weight, -1)


def tiled(
    number: int, x: Tensor, matrix: quantised.Fp8Matrix, out: Tensor, scratch: Tensor
) -> None:
    switch(matrix.weight, number)
    multiply(x, matrix, out, scratch)


def multiply(
    x: Tensor, matrix: quantised.Fp8Matrix, out: Tensor, scratch: Tensor, epilogue: int = STORE
) -> None:
    """Whatever is served."""
    torch.ops.pyserve.linear_w8a8.default(x, *matrix, None, out, scratch, epilogue)


def switch(weight: Tensor, tiling: int) -> None:
    torch.ops.pyserve.try_linear_w8a8.default(weight, -1, tiling)


def _made(
    n: int, k: int, device: torch.device, num_sets: Callable[[int], int]
) -> list[quantised.Fp8Matrix]:
    return [random_fp8(n, k, device) for _ in range(num_sets(n * k))]


def _scratch(k: int, device: torch.device) -> Tensor:
    """As much as a model has, 128 rows of a matrix at least."""
    size = max(SCRATCH_BYTES["cuda"] // 2, 128 * k)
    return torch.empty(size, dtype=torch.bfloat16, device=device)


def _rows(m: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(m, k, device=device).bfloat16()
    return x, torch.empty(m, n, dtype=torch.bfloat16, device=device)
