"""What adapters cost on an NVIDIA card: `python -m bench.gpu_lora`.

The two ops of each of an 8B model's four fused matrices, beside the matrix itself, in CUDA graphs
over copies of the inputs that no L2 holds (gpu_timing.py). By rank, by the number of adapters that
share the tokens, and by the number of tokens. `added` is what the two ops take beside the product
alone; the last line of each load sums up a model of 32 layers. Of a server: bench.gpu_adapters.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from bench.gpu_timing import time_sets
from bench.report import format_table
from pyserve import ops
from pyserve.ops import build
from pyserve.ops.lora import lora_expand, lora_shrink

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


def measure(
    name: str, num_tokens: int, num_adapters: int, size: int, max_rank: int, seconds: float
) -> tuple[float, float]:
    """us of the product alone, and of the two ops."""
    columns, k = PARTS[name]
    n, num_parts = sum(columns), len(columns)
    bounds = [sum(columns[:part]) for part in range(num_parts + 1)]
    starts = _ints(*(min(s, num_adapters) * num_tokens // num_adapters for s in range(9)))
    ranks = torch.full((NUM_SLOTS, num_parts), size, dtype=torch.int32, device=DEVICE)
    scales = torch.ones(NUM_SLOTS, num_parts, device=DEVICE)
    num_bytes = 2 * (n * k + num_tokens * (n + k))
    num_sets = max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))
    products, added = [], []
    for _ in range(num_sets):
        x, weight = _half(num_tokens, k), _half(n, k)
        out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=DEVICE)
        a, b = _half(NUM_SLOTS, num_parts, max_rank, k), _half(NUM_SLOTS, n, max_rank)
        shrunk = torch.empty(num_tokens, num_parts, max_rank, device=DEVICE)
        products.append(partial(ops.linear, x, weight, None, out))
        shrink = partial(lora_shrink, x, a, starts, ranks, scales, shrunk)
        expand = partial(lora_expand, shrunk, b, starts, ranks, _ints(*bounds), out)
        added.append(partial(_both, shrink, expand))
    return time_sets(products, seconds).us, time_sets(added, seconds).us


def _both(shrink: partial[None], expand: partial[None]) -> None:
    shrink()
    expand()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    seconds = parser.parse_args().seconds
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")
    torch.manual_seed(0)
    rows = [["tokens", "adapters", "rank", "of", "matrix", "product us", "added us", "added"]]
    for num_tokens, num_adapters, size, max_rank in LOADS:
        load = [str(it) for it in (num_tokens, num_adapters, size, max_rank)]
        sums = [0.0, 0.0]
        for name in PARTS:
            times = measure(name, num_tokens, num_adapters, size, max_rank, seconds)
            sums = [total + us for total, us in zip(sums, times, strict=True)]
            rows.append([*load, name, *_shown(*times)])
        rows.append([*load, "32 layers", *_shown(*(NUM_LAYERS * us for us in sums))])
    print(format_table(rows))


def _shown(product_us: float, added_us: float) -> list[str]:
    return [f"{product_us:,.1f}", f"{added_us:,.1f}", f"+{added_us / product_us:.1%}"]


if __name__ == "__main__":
    main()
