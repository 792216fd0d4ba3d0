"""What adapters cost on an NVIDIA card: `python -m bench.gpu_lora`.

Each of an 8B model's four fused matrices as a step calls it, without adapters and with, in CUDA
graphs over copies of the inputs that no L2 holds (gpu_timing.py). By rank, by the number of
adapters that share the tokens, and by the number of tokens. `added` is what the second takes more;
the floor of that is its bytes at the rate of a copy: the adapters' matrices, x once more, and what
is added to, read and written. The last line of each load sums up a model of 32 layers. Norms are
calls of their own here and are left out. Of a server: bench.gpu_adapters.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from bench.gpu_timing import copy_us, time_sets
from bench.report import format_table
from pyserve import ops
from pyserve.ops import build, lora

DEVICE = torch.device("cuda")
NUM_LAYERS, NUM_SLOTS, MAX_SETS, ROTATED_BYTES = 32, 8, 32, 256 * 2**20
PARTS = {  # of Llama-3.1-8B: columns of each part, and k
    "qkv": ([4096, 1024, 1024], 4096), "o": ([4096], 4096), "gate_up": ([14336, 14336], 4096),
    "down": ([4096], 14336),
}  # fmt: skip
# Tokens, adapters that share them, rank, and room for so high a rank.
LOADS = [(1, 1, 16, 16), (1, 1, 16, 64), (1, 1, 64, 64), (8, 8, 16, 16), (64, 1, 16, 16),
         (64, 8, 16, 16), (64, 8, 64, 64), (256, 8, 16, 16), (8192, 1, 16, 16)]  # fmt: skip


def _half(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) / 64


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Layer:
    """One of the matrices, its input and output, and adapters of rank `size` for its tokens."""

    def __init__(
        self, name: str, num_tokens: int, num_adapters: int, size: int, max_rank: int
    ) -> None:
        columns, k = PARTS[name]
        n, num_parts = sum(columns), len(columns)
        slots = NUM_SLOTS, num_parts
        bounds = [sum(columns[:part]) for part in range(num_parts + 1)]
        last = [min(s, num_adapters) * num_tokens // num_adapters for s in range(NUM_SLOTS + 1)]
        ranks = torch.full(slots, size, dtype=torch.int32, device=DEVICE)
        scales = torch.ones(slots, device=DEVICE)
        num_splits = lora.num_splits(num_tokens, DEVICE)
        shrunk = torch.empty(num_splits, num_tokens, num_parts, max_rank, device=DEVICE)
        self._call = name
        self._x, self._weight = _half(num_tokens, k), _half(n, k)
        self._out, self._activated = _half(num_tokens, n), _half(num_tokens, n // 2)
        a, b = _half(*slots, max_rank, k), _half(NUM_SLOTS, n, max_rank)
        starts = _ints(*last)
        self._shrink = partial(lora.lora_shrink, self._x, a, starts, ranks, scales, shrunk)
        self._second_half = shrunk, b, starts, ranks, _ints(*bounds), self._out

    def plain(self) -> None:
        """As Linear without adapters."""
        if self._call == "qkv":
            ops.linear(self._x, self._weight, None, self._out)
        elif self._call == "gate_up":
            ops.linear_silu_mul(self._x, self._weight, None, self._activated, self._out)
        else:
            ops.linear_add(self._x, self._weight, None, self._out)

    def adapted(self) -> None:
        """As Linear with them."""
        self._shrink()
        if self._call == "qkv":
            ops.linear(self._x, self._weight, None, self._out)
            lora.lora_expand(*self._second_half)
        elif self._call == "gate_up":
            ops.linear(self._x, self._weight, None, self._out)
            lora.lora_expand_silu_mul(*self._second_half, self._activated)
        else:
            lora.lora_expand(*self._second_half)
            ops.linear_add(self._x, self._weight, None, self._out)


def measure(
    name: str, num_tokens: int, num_adapters: int, size: int, max_rank: int, seconds: float
) -> tuple[float, float]:
    """us without adapters, and what is added."""
    columns, k = PARTS[name]
    n = sum(columns)
    num_bytes = 2 * (n * k + num_tokens * (n + k))
    num_sets = max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))
    layers = [Layer(name, num_tokens, num_adapters, size, max_rank) for _ in range(num_sets)]
    plain = time_sets([layer.plain for layer in layers], seconds).us
    return plain, time_sets([layer.adapted for layer in layers], seconds).us - plain


def added_bytes(name: str, num_tokens: int, num_adapters: int, size: int) -> int:
    """What the adapters of the tokens make a step read and write more, at the least."""
    columns, k = PARTS[name]
    n = sum(columns)
    return 2 * (num_adapters * size * (len(columns) * k + n) + num_tokens * (k + 2 * n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    seconds = parser.parse_args().seconds
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")
    torch.manual_seed(0)
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    bytes_per_us = 2 * source.nbytes / copy_us(torch.empty_like(source), source)
    rows = [["tokens", "adapters", "rank", "of", "matrix", "without us", "added us", "floor us",
             "added"]]  # fmt: skip
    for num_tokens, num_adapters, size, max_rank in LOADS:
        load = [str(it) for it in (num_tokens, num_adapters, size, max_rank)]
        sums = [0.0, 0.0, 0.0]
        for name in PARTS:
            floor = added_bytes(name, num_tokens, num_adapters, size) / bytes_per_us
            times = *measure(name, num_tokens, num_adapters, size, max_rank, seconds), floor
            sums = [total + us for total, us in zip(sums, times, strict=True)]
            rows.append([*load, name, *_shown(*times)])
        rows.append([*load, "32 layers", *_shown(*(NUM_LAYERS * us for us in sums))])
    print(format_table(rows))


def _shown(plain_us: float, added_us: float, floor_us: float) -> list[str]:
    return [
        f"{plain_us:,.1f}", f"{added_us:,.1f}", f"{floor_us:,.1f}", f"{added_us / plain_us:+.1%}"
    ]  # fmt: skip


if __name__ == "__main__":
    main()
