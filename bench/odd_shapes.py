"""Are shapes that nobody tunes to as fast as their neighbours: `python -m bench.odd_shapes`.

On an NVIDIA card. Decode attention (rotation and cache write in it) and Linears of models, batches
and contexts that no kernel was measured with while it was written, beside what the tuned shapes of
Llama 3 lead one to expect: their times at the batches on either side, interpolated in bytes, then
between the batches. 90 % of that rate is asked. A Linear has as many rows as a step pads so many
to. Calls are timed as bench.ops does it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu_attention import Heads, attention_chain
from bench.gpu_chains import Chain
from bench.gpu_ops import DEVICE, num_sets
from bench.gpu_timing import time_sets
from bench.report import environment, format_table, write_json
from pyserve import ops
from pyserve.engine.batch import padded_size
from pyserve.ops import build

ASKED = 0.9
MAX_BYTES = 24e9  # of a case's keys and values
TUNED_HEADS = Heads(32, 8, 128, name="Llama-3.1-8B")
ODD_HEADS = (
    Heads(28, 4, 128, name="Qwen2.5-7B"),
    Heads(32, 8, 128, name="Mistral-7B"),
    Heads(64, 8, 128, name="CodeLlama-34B"),
    Heads(32, 8, 64, name="Llama-3.2-1B"),
)
TUNED_ROWS, ODD_ROWS = (1, 4, 16, 64, 256), (3, 37, 200)
TUNED_CONTEXTS, ODD_CONTEXTS = (1, 16, 64, 256, 1024, 8192, 131072), (1, 15, 16, 17, 100001)
# [n, k] of a layer's fused matrices.
TUNED_MATRICES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),  # Llama-3.1-8B
    (5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192),  # Llama-3.2-3B
    (10240, 8192), (57344, 8192),  # of a 70B
)  # fmt: skip
ODD_MATRICES = {
    "Qwen2.5-7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "Mistral-7B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "CodeLlama-34B": ((10240, 8192), (8192, 8192), (44032, 8192), (8192, 22016)),
}
MAX_BATCH = 256
TUNED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# By a batch, what calls of so many bytes a row (attention) or in all (Linears) take, us.
Curves = dict[int, list[tuple[float, float]]]


class Odd(NamedTuple):
    op: str
    load: str
    batch: int
    num_bytes: float
    us: float


def on_curve(points: Sequence[tuple[float, float]], num_bytes: float) -> float:
    """us by straight lines between the points, which are sorted; the outer ones go on."""
    if len(points) == 1:
        return points[0][1]
    place = min(max(bisect_left(points, (num_bytes, 0.0)), 1), len(points) - 1)
    (low, low_us), (high, high_us) = points[place - 1 : place + 1]
    return low_us + (num_bytes - low) / (high - low) * (high_us - low_us)


def expected_us(curves: Curves, batch: int, num_bytes: float) -> float:
    """Between the batches on either side, each at so many bytes."""
    batches = sorted(curves)
    place = min(max(bisect_left(batches, batch), 1), len(batches) - 1)
    low, high = batches[place - 1 : place + 1]
    low_us, high_us = (on_curve(curves[it], num_bytes) for it in (low, high))
    return low_us + (batch - low) / (high - low) * (high_us - low_us)


def timed(chain: Chain, seconds: float) -> float:
    return time_sets(chain.runs, seconds).us


def attention(heads: Heads, rows: int, context: int) -> Chain | None:
    """None where its keys and values would take too much room."""
    if 4.0 * rows * context * heads.num_kv_heads * heads.head_dim > MAX_BYTES:
        return None
    return attention_chain(
        heads, f"{rows} x {context:,}", [(1, context)] * rows, device=DEVICE, num_sets=num_sets,
        has_rope=True,
    )  # fmt: skip


def linear(n: int, k: int, batch: int) -> Chain:
    num_bytes = 2 * (n * k + batch * (n + k))
    num_rows = padded_size(batch, MAX_BATCH)
    x = torch.randn(num_rows, k, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(num_rows, n, dtype=torch.bfloat16, device=DEVICE)
    weights = [
        torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE) for _ in range(num_sets(num_bytes))
    ]
    runs: list[Callable[[], object]] = [
        partial(ops.linear, x, weight, None, out) for weight in weights
    ]
    return Chain("linear", f"{batch} x {k} -> {n}", runs, num_bytes, 2 * batch * n * k)


def curves_of(chains: Iterable[tuple[int, float, Chain]], seconds: float) -> Curves:
    """Of chains with their batch and bytes."""
    curves: Curves = {}
    for batch, num_bytes, chain in chains:
        curves.setdefault(batch, []).append((num_bytes, timed(chain, seconds)))
    return {batch: sorted(points) for batch, points in curves.items()}


def tuned_attention() -> Iterator[tuple[int, float, Chain]]:
    for rows, context in itertools.product(TUNED_ROWS, TUNED_CONTEXTS):
        chain = attention(TUNED_HEADS, rows, context)
        if chain is not None:
            yield rows, chain.num_bytes / rows, chain


def odd_attention(seconds: float) -> Iterator[Odd]:
    for heads, rows, context in itertools.product(ODD_HEADS, ODD_ROWS, ODD_CONTEXTS):
        chain = attention(heads, rows, context)
        if chain is not None:
            us = timed(chain, seconds)
            yield Odd(chain.name, f"{chain.load}, {heads.name}", rows, chain.num_bytes / rows, us)


def tuned_linears() -> Iterator[tuple[int, float, Chain]]:
    for (n, k), batch in itertools.product(TUNED_MATRICES, TUNED_BATCHES):
        chain = linear(n, k, batch)
        yield batch, float(chain.num_bytes), chain


def odd_linears(seconds: float) -> Iterator[Odd]:
    for model, matrices in ODD_MATRICES.items():
        for (n, k), batch in itertools.product(matrices, ODD_ROWS):
            chain = linear(n, k, batch)
            us = timed(chain, seconds)
            yield Odd(chain.name, f"{chain.load}, {model}", batch, chain.num_bytes, us)


def run(seconds: float) -> list[dict[str, Any]]:
    """Prints a line for each shape, then the table of those that miss."""
    results = []
    for tuned, odd in ((tuned_attention, odd_attention), (tuned_linears, odd_linears)):
        curves = curves_of(tuned(), seconds)
        for case in odd(seconds):
            expected = expected_us(curves, case.batch, case.num_bytes)
            share = expected / case.us
            print(
                f"{case.op} {case.load}: {case.us:.1f} us, expected {expected:.1f}: {share:.2f}"
                f"{'' if share >= ASKED else ' MISSED'}", flush=True,
            )  # fmt: skip
            results.append(case._asdict() | {"expected_us": expected, "share": share})
    missed = [it for it in results if it["share"] < ASKED]
    if missed:
        rows = [["op", "load", "us", "expected", "share"]]
        for it in sorted(missed, key=lambda it: it["share"]):
            figures = (f"{it['us']:.1f}", f"{it['expected_us']:.1f}", f"{it['share']:.2f}")
            rows.append([it["op"], it["load"], *figures])
        print(f"\n{format_table(rows)}")
    print(f"= {len(results) - len(missed)} of {len(results)} shapes at {ASKED:.0%} or more")
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.05, help="of each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")
    torch.manual_seed(0)
    results = run(args.seconds)
    write_json(args.json, {"results": results, "environment": environment(["torch"])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
