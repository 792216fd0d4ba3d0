"""Products with matrices of 4-bit integers, for bench.ops and bench.gpu_ops: what is measured, and
its bytes. The integers are random: zeros would be too kind to a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.gpu_chains import Chain
from pyserve.ops import SILU_MUL, STORE, quantised, w4a16

SLICE_BYTES = 24 * 2**20  # of plain numbers at a time, as model/w4a16.py has them on a card
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TILED_ROWS = (17, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LONG_ROWS = (256, 1024, 2048, 4096, 8192)
LONG_TILINGS = (11, 13, 19)  # which prompts are multiplied by
GATE_UP = "gate_up"  # which a model has multiplied with silu_mul behind it
HEAD = "lm_head"  # which no checkpoint has in 4 bits
OWN = "own linear_w4a16"  # the kernels of the integers, whatever a step would take
# Of gemm_w4a16_sm90a.cu, in its order, counted from 1: groups of 64 rows of weight, rows of x,
# CTAs that divide k, warpgroups of a CTA that take turns.
TILINGS = (
    *(
        (groups, tokens, parts, 1)
        for tokens in (32, 64)
        for groups, parts in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
    ),
    *((groups, 128, parts, 1) for groups in (1, 2) for parts in (1, 2)),
    *((1, tokens, parts, 4) for tokens in (32, 64) for parts in (1, 2)),
    (2, 256, 1, 1),
)
# Percent of what a copy moves at 1 row, and at 16 rows so much of it.
TARGETS = {"gate_up": 70.0, "down": 60.0, "qkv": 50.0, "o": 40.0}
SHARE_OF_16 = 0.8


def random_packed(n: int, k: int, device: torch.device) -> Tensor:
    """In the largest groups that divide k."""
    group_size = next(size for size in reversed(w4a16.GROUP_SIZES) if k % size == 0)
    packed = torch.zeros(w4a16.packed_shape(n, k, group_size), dtype=torch.int32, device=device)
    w4a16.fill_with_noise(packed, n, k, 0.02, torch.Generator(device).manual_seed(n))
    return packed


def products(
    matrices: Mapping[str, tuple[int, int]], device: torch.device,
    num_sets: Callable[[int], int], rows: Sequence[int] = ROWS,
) -> Iterator[Chain]:  # fmt: skip
    """Each matrix [n, k] by so many rows, in bfloat16: as `ops` has it done, and by the kernels of
    the integers. And a slice of it made plain numbers."""
    for name, (n, k) in matrices.items():
        if name == HEAD:
            continue
        matrix_bytes = random_packed(n, k, device).nbytes
        made = [random_packed(n, k, device) for _ in range(num_sets(matrix_bytes))]
        num_strips = max(1, min(made[0].shape[0], SLICE_BYTES // (2 * k * w4a16.STRIP_ROWS)))
        num_rows = min(n, num_strips * w4a16.STRIP_ROWS)
        scratch = torch.empty(num_rows * k, dtype=torch.bfloat16, device=device)
        runs: list[Callable[[], object]] = [
            partial(
                quantised.dequantise,
                quantised.W4A16Matrix(packed[:num_strips]),
                scratch.view(num_rows, k),
            )
            for packed in made
        ]
        num_bytes = made[0][:num_strips].nbytes + scratch.nbytes
        yield Chain("dequantise_w4a16", f"{num_rows} x {k} ({name})", runs, num_bytes, 0)
        for m in rows:
            x = torch.randn(m, k, device=device).bfloat16()
            out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
            runs = [
                partial(
                    quantised.linear, x, quantised.W4A16Matrix(packed), None, out, scratch.view(-1)
                )
                for packed in made
            ]
            load = f"{m} x {k} -> {n} ({name})"
            size = matrix_bytes + x.nbytes + out.nbytes, 2 * m * n * k
            yield Chain("linear_w4a16", load, runs, *size)
            own = torch.ops.pyserve.linear_w4a16.default
            runs = [partial(own, x, packed, None, out) for packed in made]
            yield Chain(OWN, load, runs, *size, target_of(name, m))


def tilings(
    matrices: Mapping[str, tuple[int, int]], device: torch.device,
    num_sets: Callable[[int], int], rows: Sequence[int] = TILED_ROWS,
) -> Iterator[Chain]:  # fmt: skip
    """Each tiling that may be the fastest for a matrix by so many rows: which is chosen is an
    estimate."""
    for name, (n, k) in matrices.items():
        if name == HEAD:
            continue
        size = random_packed(n, k, device).nbytes
        made = [random_packed(n, k, device) for _ in range(num_sets(size))]
        for m in rows:
            x = torch.randn(m, k, device=device).bfloat16()
            epilogue = SILU_MUL if name == GATE_UP else STORE
            width = n // 2 if name == GATE_UP else n
            out = torch.empty(m, width, dtype=torch.bfloat16, device=device)
            num_bytes = size + x.nbytes + out.nbytes
            for number, (groups, tokens, parts, turns) in enumerate(TILINGS, 1):
                if not min(64, m) <= tokens < max(2 * m, 33):
                    continue
                if turns > 1 and name == GATE_UP:  # for which there is none
                    continue
                runs: list[Callable[[], object]] = [
                    partial(tiled, number, x, packed, out, epilogue) for packed in made
                ]
                tile = f"{64 * groups} x {tokens}, {parts} parts, {turns} turns"
                load = f"{m} x {k} -> {n} ({name}), {tile}"
                yield Chain(f"tiling {number}", load, runs, num_bytes, 2 * m * n * k)
    switch(made[0], -1, -1)


class Plain(quantised.W4A16Matrix):
    """A matrix that is made plain numbers, whatever is the fastest."""

    __slots__ = ()

    def is_own(self, x: Tensor) -> bool:
        return False


def prompts(
    matrices: Mapping[str, tuple[int, int]], device: torch.device,
    num_sets: Callable[[int], int], rows: Sequence[int] = LONG_ROWS,
) -> Iterator[Chain]:  # fmt: skip
    """Each matrix, gate and up with silu_mul, by the rows of a prompt: by plain numbers, and by the
    tilings that may be faster."""
    for name, (n, k) in matrices.items():
        if name == HEAD:
            continue
        matrix_bytes = random_packed(n, k, device).nbytes
        made = [random_packed(n, k, device) for _ in range(num_sets(matrix_bytes))]
        scratch = torch.empty(max(SLICE_BYTES // 2, 16 * k), dtype=torch.bfloat16, device=device)
        is_paired = name == GATE_UP
        epilogue, width = (SILU_MUL, n // 2) if is_paired else (STORE, n)
        for m in rows:
            x = torch.randn(m, k, device=device).bfloat16()
            out = torch.empty(m, width, dtype=torch.bfloat16, device=device)
            gate_up = torch.empty(m if is_paired else 0, n, dtype=torch.bfloat16, device=device)
            load = f"{m} x {k} -> {n} ({name})"
            size = matrix_bytes + x.nbytes + out.nbytes, 2 * m * n * k
            runs: list[Callable[[], object]] = [
                partial(quantised.linear_silu_mul, x, Plain(it), None, out, gate_up, scratch)
                if is_paired
                else partial(quantised.linear, x, Plain(it), None, out, scratch)
                for it in made
            ]
            yield Chain("plain numbers", load, runs, *size)
            for number in LONG_TILINGS:
                runs = [partial(tiled, number, x, it, out, epilogue) for it in made]
                yield Chain(f"tiling {number}", load, runs, *size)
    switch(made[0], -1, -1)


def tiled(number: int, x: Tensor, packed: Tensor, out: Tensor, epilogue: int) -> None:
    switch(packed, -1, number)
    torch.ops.pyserve.linear_w4a16.default(x, packed, None, out, epilogue)


def switch(packed: Tensor, max_rows: int, tiling: int) -> None:
    torch.ops.pyserve.try_linear_w4a16.default(packed, max_rows, tiling)


def target_of(name: str, num_rows: int) -> tuple[str, float] | None:
    if name not in TARGETS or num_rows not in (1, 16):
        return None
    return "%", TARGETS[name] * (1.0 if num_rows == 1 else SHARE_OF_16)
