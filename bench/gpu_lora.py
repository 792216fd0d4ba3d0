"""What adapters cost on an NVIDIA card: `python -m bench.gpu_lora`.

Each of an 8B model's four fused matrices as a step calls it, of 16 bits and of 4, without adapters
and with, in CUDA graphs over copies of the inputs that no L2 holds (gpu_timing.py). By rank, by the
number of adapters that share the tokens, and by the number of tokens. `added` is what the second
takes more; the floor of that is its bytes at the rate of a copy: the adapters' matrices, x once
more, and what is added to, read and written. For up to 8 tokens there is also what each half adds
without the other: shrink in front of the product, and expand, inside the product's kernel where
that serves it (ops.lora.linear_lora). The last line of each load sums up a model of 32 layers.
Norms are calls of their own here and are left out. Of a server: bench.gpu_adapters.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu_timing import copy_us, time_sets
from bench.report import format_table
from pyserve.model.adapter_weights import Pair
from pyserve.model.context import AdapterRows
from pyserve.model.layers import adapters as adapters_module
from pyserve.model.layers.linear import Linear, Output
from pyserve.model.placement import Placement
from pyserve.model.quantization import Quantization
from pyserve.model.schemes import Dense
from pyserve.model.w4a16 import W4A16
from pyserve.ops import build, lora, w4a16

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
NUM_LAYERS, NUM_SLOTS, MAX_SETS, ROTATED_BYTES = 32, 8, 32, 256 * 2**20
PARTS = {  # of Llama-3.1-8B: columns of each part, and k
    "qkv": ([4096, 1024, 1024], 4096), "o": ([4096], 4096), "gate_up": ([14336, 14336], 4096),
    "down": ([4096], 14336),
}  # fmt: skip
# Tokens, adapters that share them, rank, and room for so high a rank; by bits of the matrix.
LOADS = {
    16: [(1, 1, 16, 16), (1, 1, 16, 64), (1, 1, 64, 64), (8, 8, 16, 16), (16, 8, 16, 16),
         (32, 8, 16, 16), (64, 1, 16, 16), (64, 8, 16, 16), (64, 8, 64, 64), (256, 8, 16, 16),
         (1024, 1, 16, 16), (8192, 1, 16, 16)],
    4: [(1, 1, 16, 16), (1, 1, 64, 64), (8, 8, 16, 16), (16, 8, 16, 16), (64, 8, 16, 16)],
}  # fmt: skip


def _half(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE) / 64


class Layer:
    """One of the matrices, its input and output, and adapters of rank `size` for its tokens."""

    def __init__(
        self, bits: int, name: str, num_tokens: int, num_adapters: int, size: int, max_rank: int
    ) -> None:
        columns, k = PARTS[name]
        n, num_parts = sum(columns), len(columns)
        integers = Quantization(method="gptq", storage="gptq") if bits == 4 else None
        placement = Placement(
            DTYPE, DEVICE, quantization=integers, num_adapter_slots=NUM_SLOTS,
            max_adapter_rank=max_rank,
        )  # fmt: skip
        outputs = [Output(str(part), width) for part, width in enumerate(columns)]
        self._linear = linear = Linear(outputs, k, placement)
        matrix = linear.matrix
        if isinstance(matrix, W4A16):
            generator = torch.Generator(DEVICE).manual_seed(n)
            w4a16.fill_with_noise(matrix.packed, n, k, 0.02, generator)
        else:
            assert isinstance(matrix, Dense)
            matrix.weight.normal_(std=0.02)
        assert linear.adapters is not None
        for slot in range(NUM_SLOTS):
            pairs = {it.name: Pair(_half(size, k), _half(it.size, size), 1.0) for it in outputs}
            linear.adapters.put(slot, pairs)
        last = [min(s, num_adapters) * num_tokens // num_adapters for s in range(NUM_SLOTS + 1)]
        starts = torch.tensor(last, dtype=torch.int32, device=DEVICE)
        num_splits = lora.num_splits(num_tokens, DEVICE)
        shrunk = torch.empty(num_splits, num_tokens, num_parts, max_rank, device=DEVICE)
        self._rows = AdapterRows(starts, {num_parts: shrunk})
        self._call = name
        self._x, self._out = _half(num_tokens, k), _half(num_tokens, n)
        self._activated = _half(num_tokens, n // 2)

    def plain(self) -> None:
        self._run(None)

    def adapted(self) -> None:
        self._run(self._rows)

    def shrink_only(self) -> None:
        assert self._linear.adapters is not None
        self._linear.adapters.shrink(self._x, self._rows)
        self._run(None)

    def _run(self, rows: AdapterRows | None) -> None:
        if self._call == "qkv":
            self._linear(self._x, self._out, rows)
        elif self._call == "gate_up":
            self._linear.silu_mul(self._x, self._out, self._activated, rows)
        else:
            self._linear.add(self._x, self._out, rows)


class Times(NamedTuple):
    """us without adapters, and what is added: by both halves, and by each alone for few tokens."""

    plain: float
    added: float
    shrink: float | None = None
    expand: float | None = None


def measure(
    bits: int, name: str, num_tokens: int, num_adapters: int, size: int, max_rank: int,
    seconds: float,
) -> Times:  # fmt: skip
    columns, k = PARTS[name]
    n = sum(columns)
    num_bytes = bits * n * k // 8 + 2 * num_tokens * (n + k)
    num_sets = max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))
    load = num_tokens, num_adapters, size, max_rank
    layers = [Layer(bits, name, *load) for _ in range(num_sets)]
    plain = time_sets([layer.plain for layer in layers], seconds).us
    adapted = [layer.adapted for layer in layers]
    added = time_sets(adapted, seconds).us - plain
    if num_tokens > lora.MAX_LINEAR_ROWS:
        return Times(plain, added)
    shrink = time_sets([layer.shrink_only for layer in layers], seconds).us - plain
    with patch.object(adapters_module, "lora_shrink", lambda *_: None):
        expand = time_sets(adapted, seconds).us - plain
    return Times(plain, added, shrink, expand)


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
    rows = [["bits", "tokens", "adapters", "rank", "of", "matrix", "without us", "added us",
             "floor us", "added", "shrink us", "expand us"]]  # fmt: skip
    for bits, load in ((bits, load) for bits, loads in LOADS.items() for load in loads):
        words = [str(it) for it in (bits, *load)]
        floors = [added_bytes(name, *load[:3]) / bytes_per_us for name in PARTS]
        times = [measure(bits, name, *load, seconds) for name in PARTS]
        for name, own, floor in zip(PARTS, times, floors, strict=True):
            rows.append([*words, name, *_shown(own, floor)])
        rows.append([*words, "32 layers", *_shown(_layers(times), NUM_LAYERS * sum(floors))])
    print(format_table(rows))


def _layers(times: list[Times]) -> Times:
    halves = [
        None if None in own else NUM_LAYERS * sum(us for us in own if us is not None)
        for own in ([it.shrink for it in times], [it.expand for it in times])
    ]
    plain, added = sum(it.plain for it in times), sum(it.added for it in times)
    return Times(NUM_LAYERS * plain, NUM_LAYERS * added, *halves)


def _shown(times: Times, floor_us: float) -> list[str]:
    halves = ["" if us is None else f"{us:,.1f}" for us in (times.shrink, times.expand)]
    return [
        f"{times.plain:,.1f}", f"{times.added:,.1f}", f"{floor_us:,.1f}",
        f"{times.added / times.plain:+.1%}", *halves,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
