"""Every op against its floor and against its plain-torch twin.

    OMP_WAIT_POLICY=passive python -m bench.ops --threads 2
    python -m bench.ops --only attention,sample --dtype float32 --shapes 7b
    python -m bench.ops --device cuda         # on an NVIDIA card: gpu_ops.py says what and how

The floor is what this machine needs for a copy that moves as many bytes as the op must read and
write (same dtype, same threads, so the same cache level), or for as many multiply-adds as the op
must do at the rate of a large matrix product, whichever is longer. `us` is the median of
repeated calls of the wrapper, output allocation included. OMP_WAIT_POLICY=passive is what the
server runs with: without it the threads spin between calls and figures come out better.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from bench import experts, gpu_ops, latent, quantised
from bench.report import busy_remark, environment, format_table, write_json
from pyserve import ops
from pyserve.ops import build, reference
from pyserve.ops import step_layout as layout

BLOCK_SIZE = 16
GEMM_SIZE = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, and the loads its ops are measured under."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    context: int  # tokens of KV a decoding sequence has
    batches: tuple[int, ...]
    prefill: int  # tokens of one prompt


SHAPES = {
    "demo": Shape(256, 4, 2, 64, 576, 2048, 256, (1, 16, 64), 256),
    "7b": Shape(4096, 32, 8, 128, 14336, 32000, 1024, (1, 16), 512),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One op under one load; num_bytes and num_flops are the least it must move and do."""

    op: str
    load: str
    run: Callable[[], object]
    twin: Callable[[], object]
    num_bytes: int
    num_flops: int = 0
    flops_dtype: torch.dtype = torch.float32  # what the op multiplies in


class Machine(Protocol):
    """Where the ops run and how their time is taken."""

    device: torch.device

    def time_us(self, fn: Callable[[], object]) -> float: ...


class Cpu:
    """Wall time, median over batches of calls long enough for the clock."""

    device = torch.device("cpu")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time_us(self, fn: Callable[[], object]) -> float:
        fn()
        started = time.perf_counter()
        fn()
        once = max(time.perf_counter() - started, 1e-7)
        per_batch = max(1, int(2e-4 / once))
        for _ in range(min(per_batch, 200)):
            fn()
        times: list[float] = []
        deadline = time.perf_counter() + self._seconds
        while time.perf_counter() < deadline or len(times) < 3:
            started = time.perf_counter()
            for _ in range(per_batch):
                fn()
            times.append((time.perf_counter() - started) / per_batch)
        return statistics.median(times) * 1e6


@dataclass(frozen=True, slots=True)
class Result:
    """Microseconds, and gigabytes a second of the bytes the op must move."""

    op: str
    load: str
    us: float
    gb_per_s: float
    floor_us: float
    ratio: float  # us / floor_us
    twin_us: float


def measure(case: Case, machine: Machine, gflops: dict[torch.dtype, float]) -> Result:
    """Time a case, its twin and its floor."""
    us = machine.time_us(case.run)
    half = max(case.num_bytes // 2, 1)
    source = torch.empty(half, dtype=torch.uint8, device=machine.device)
    copy_us = machine.time_us(partial(torch.empty_like(source).copy_, source))
    floor_us = max(copy_us, case.num_flops / (gflops[case.flops_dtype] * 1e3))
    return Result(
        case.op,
        case.load,
        us,
        case.num_bytes / us / 1e3,
        floor_us,
        us / floor_us,
        machine.time_us(case.twin),
    )


def gemm_gflops(machine: Machine, dtype: torch.dtype) -> float:
    """Rate of a large matrix product."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=machine.device).to(dtype)
    return 2 * GEMM_SIZE**3 / machine.time_us(partial(torch.mm, a, a)) / 1e3


def norm_cases(shape: Shape, num_tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    x, residual = torch.randn(2, num_tokens, shape.hidden).to(dtype)
    weight, out = torch.ones(shape.hidden, dtype=dtype), torch.empty_like(x)
    size, load = x.nbytes, f"{num_tokens} x {shape.hidden}"
    yield Case(
        "rms_norm",
        load,
        lambda: ops.rms_norm(x, weight, 1e-6),
        lambda: reference.rms_norm(x, weight, 1e-6, out),
        2 * size,
    )
    yield Case(
        "add_rms_norm",
        load,
        lambda: ops.add_rms_norm(x, residual, weight, 1e-6),
        lambda: reference.add_rms_norm(x, residual, weight, 1e-6, out),
        4 * size,
    )


def linear_cases(shape: Shape, num_tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    """The two largest matrices of a layer; their twin is torch's own product."""
    for k, n in ((shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)):
        x, weight = torch.randn(num_tokens, k).to(dtype), torch.randn(n, k).to(dtype)
        yield Case(
            "linear",
            f"{num_tokens} x {k} -> {n}",
            partial(ops.linear, x, weight),
            partial(functional.linear, x, weight),
            weight.nbytes + x.nbytes + num_tokens * n * x.element_size(),
            2 * num_tokens * n * k,
            dtype,
        )


def epilogue_cases(shape: Shape, num_tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    """Products with what follows them; their twins are torch's product and our op for the rest."""
    hidden, size = shape.hidden, shape.intermediate
    x, wide = torch.randn(num_tokens, hidden).to(dtype), torch.randn(num_tokens, size).to(dtype)
    down, residual = torch.randn(hidden, size).to(dtype), torch.zeros(num_tokens, hidden).to(dtype)
    gate_up, both = torch.randn(2 * size, hidden).to(dtype), torch.empty(num_tokens, 2 * size)
    both = both.to(dtype)
    yield Case(
        "linear_add",
        f"{num_tokens} x {size} -> {hidden}",
        partial(ops.linear_add, wide, down, None, residual),
        lambda: residual.add_(functional.linear(wide, down)),
        down.nbytes + wide.nbytes + 2 * residual.nbytes,
        2 * num_tokens * size * hidden,
        dtype,
    )
    yield Case(
        "linear_silu_mul",
        f"{num_tokens} x {hidden} -> {size}",
        partial(ops.linear_silu_mul, x, gate_up, None, torch.empty_like(wide), both),
        lambda: ops.silu_mul(functional.linear(x, gate_up)),
        gate_up.nbytes + x.nbytes + wide.nbytes,
        4 * num_tokens * size * hidden,
        dtype,
    )


def activation_cases(shape: Shape, num_tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    gate_up = torch.randn(num_tokens, 2 * shape.intermediate).to(dtype)
    out = torch.empty(num_tokens, shape.intermediate, dtype=dtype)
    for name in ("silu_mul", "gelu_tanh_mul"):
        yield Case(
            name,
            f"{num_tokens} x {shape.intermediate}",
            partial(getattr(ops, name), gate_up),
            partial(getattr(reference, name), gate_up, out),
            gate_up.nbytes + out.nbytes,
        )


def rope_cases(shape: Shape, num_tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1
    cache = torch.zeros(2, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, dtype=dtype)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(num_tokens, heads * shape.head_dim).to(dtype)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    angles = torch.rand(num_tokens, shape.head_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    slots = torch.randperm(num_tokens)

    def run() -> None:
        ops.rope_write_kv(
            qkv, positions, cos_sin, slots, cache[0], cache[1], num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
        )  # fmt: skip

    def twin() -> None:
        reference.rope_write_kv(
            qkv, positions, cos_sin, slots, None, None, 0.0, shape.num_heads, shape.num_kv_heads,
            cache[0], cache[1],
        )  # fmt: skip

    load = f"{num_tokens} x ({shape.num_heads} + 2 x {shape.num_kv_heads}) x {shape.head_dim}"
    yield Case("rope_write_kv", load, run, twin, 2 * qkv.nbytes + cos_sin.nbytes)


def attention_case(
    shape: Shape, rows: Sequence[tuple[int, int]], load: str, dtype: torch.dtype
) -> Case:
    """rows of (query_len, seq_len)."""
    blocks = [-(-seq_len // BLOCK_SIZE) for _, seq_len in rows]
    ids = torch.randperm(sum(blocks)).int()
    kv_shape = (2, sum(blocks), BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    cache = torch.randn(kv_shape).to(dtype)
    table = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
    for row, part in enumerate(ids.split(blocks)):
        table[row, : len(part)] = part
    query_lens = torch.tensor([query_len for query_len, _ in rows])
    starts = torch.cat((torch.zeros(1), query_lens.cumsum(0))).int()
    q = torch.randn(int(query_lens.sum()), shape.num_heads, shape.head_dim).to(dtype)
    out, scale = torch.empty_like(q), shape.head_dim**-0.5
    slots = torch.arange(len(rows)).int()
    seq_lens = torch.tensor([seq_len for _, seq_len in rows]).int()
    inputs = (q, cache[0], cache[1], table, slots, starts, seq_lens)
    pairs = sum(n * (2 * length - n + 1) // 2 for n, length in rows)  # visible (query, key)
    return Case(
        "paged_attention",
        load,
        lambda: ops.paged_attention(*inputs, softmax_scale=scale),
        lambda: reference.paged_attention(*inputs, scale, 0, len(inputs[0]), None, None, out),
        cache.nbytes + 2 * q.nbytes,
        4 * pairs * shape.num_heads * shape.head_dim,
    )


def attention_cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for batch in shape.batches:
        load = f"decode {batch} x {shape.context}"
        yield attention_case(shape, [(1, shape.context)] * batch, load, dtype)
    length = shape.prefill
    yield attention_case(shape, [(length, length)], f"prefill {length}", dtype)
    mixed = [(length, 2 * length)] + [(1, shape.context)] * shape.batches[-1]
    load = f"chunk {length} of {2 * length} + decode {shape.batches[-1]} x {shape.context}"
    yield attention_case(shape, mixed, load, dtype)


def latent_cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Latents as DeepSeek has them, measured by the heads."""
    sizes = latent.Sizes(shape.num_heads, 4 * shape.head_dim, shape.head_dim // 2, shape.head_dim)
    loads = {f"decode {n} x {shape.context}": [(1, shape.context)] * n for n in shape.batches}
    loads |= {f"prefill {shape.prefill}": [(shape.prefill, shape.prefill)]}
    yield from (Case(*case) for case in latent.cpu_cases(sizes, loads, dtype))


SAMPLERS: dict[str, dict[int, float]] = {
    "greedy": {},
    "temperature": {layout.SLOT_TEMPERATURE: 0.8},
    "top-k 50, top-p 0.9": {
        layout.SLOT_TEMPERATURE: 0.8,
        layout.SLOT_TOP_K: 50,
        layout.SLOT_TOP_P: 0.9,
    },
    "top-p 0.9": {layout.SLOT_TEMPERATURE: 0.8, layout.SLOT_TOP_P: 0.9},
    "penalties": {layout.SLOT_HAS_PENALTIES: 1, layout.SLOT_REPETITION_PENALTY: 1.01},
}
INT_WORDS = (layout.SLOT_TOP_K, layout.SLOT_HAS_PENALTIES)


def sample_cases(shape: Shape, num_samples: int) -> Iterator[Case]:
    """Logits are peaked as those of a trained model are: a few tokens hold most of the mass."""
    logits = torch.randn(num_samples, shape.vocab_size) * 2
    logits[:, :20] += torch.linspace(12, 4, 20)
    ids = torch.arange(num_samples).int()
    for name, words in SAMPLERS.items():
        slots = torch.zeros(num_samples, layout.SLOT_WORDS, dtype=torch.int32)
        real = slots.view(torch.float32)
        real[:, [layout.SLOT_TOP_P, layout.SLOT_REPETITION_PENALTY]] = 1.0
        for word, value in words.items():
            if word in INT_WORDS:
                slots[:, word] = int(value)
            else:
                real[:, word] = value
        counts = torch.zeros(num_samples, shape.vocab_size, dtype=torch.int16)
        sampled = torch.empty_like(ids)
        yield Case(
            "sample",
            f"{num_samples} x {shape.vocab_size}, {name}",
            partial(ops.sample, logits, ids, slots, counts),
            partial(reference.sample, logits, ids, slots, counts, None, sampled),
            logits.nbytes + (counts.nbytes if layout.SLOT_HAS_PENALTIES in words else 0),
        )


def bitmask_cases(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Iterator[Case]:
    """A grammar allows a few tokens, as inside a number, or nearly all, as inside a string."""
    logits = torch.randn(num_rows, vocab_size).to(dtype)
    rows = torch.arange(num_rows).int()
    for name, share in (("0.1 % allowed", 0.001), ("99 % allowed", 0.99)):
        # Tokens of a kind do not lie together: each bit is drawn for itself.
        is_allowed = torch.rand(num_rows, -(-vocab_size // 32), 32) < share
        mask = torch.where(is_allowed, 1 << torch.arange(32), 0).sum(-1).int()
        num_forbidden = int((~is_allowed).sum())
        yield Case(
            "apply_bitmask",
            f"{num_rows} x {vocab_size}, {name}",
            partial(ops.apply_bitmask, logits, mask, rows),
            partial(reference.apply_bitmask, logits, mask, rows),
            mask.nbytes + num_forbidden * logits.element_size(),
        )


def logprobs_cases(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every row asks."""
    logits = (torch.randn(num_rows, vocab_size) * 2).to(dtype)
    rows = torch.arange(num_rows).int()
    out = ops.LogprobRows.of(torch.zeros(num_rows, ops.LOGPROB_WORDS, dtype=torch.int32))
    yield Case(
        "logprobs",
        f"{num_rows} x {vocab_size}",
        partial(ops.logprobs, logits, rows, rows, out),
        partial(reference.logprobs, logits, rows, rows, True, *out[1:]),
        logits.nbytes + out.words.nbytes,
    )


def step_cases(shape: Shape, num_rows: int) -> Iterator[Case]:
    """A decoding step whose tokens the host knows; each row's first block is set again."""
    buffer = np.zeros(64 * num_rows + 64, dtype=np.int32)
    slots = torch.zeros(num_rows, layout.SLOT_WORDS, dtype=torch.int32)
    table = torch.zeros(num_rows, shape.context // BLOCK_SIZE, dtype=torch.int32)
    counts = torch.zeros(num_rows, shape.vocab_size, dtype=torch.int16)
    ids = list(range(num_rows))
    tokens: list[list[int] | None] = [[7]] * num_rows
    step = (ids, [1] * num_rows, tokens, [True] * num_rows)
    blocks = [word for slot in ids for word in (slot, 0, slot)]
    neutral = struct.pack("<16i", *[0] * 5, 0x3F800000, 0, 0, 0x3F800000, *[0] * 7)
    records = [struct.pack("<4i", 20, slot, 0, 0) + neutral for slot in ids]
    num_words = ops.pack_step(buffer, *step, blocks, records)
    words = torch.from_numpy(buffer[:num_words])
    plan = ops.StepPlan.allocate(num_rows, num_rows, torch.device("cpu"))
    outputs = list(plan)
    tables = (slots, table, counts, BLOCK_SIZE)
    num_bytes = 2 * words.nbytes
    for name, run, twin in (
        (
            "pack_step",
            partial(ops.pack_step, buffer, *step, blocks, records),
            partial(reference.pack_step, buffer, *step, blocks, records),
        ),
        (
            "plan_step",
            partial(ops.plan_step, words, *tables, plan),
            partial(reference.plan_step, words, *tables, *outputs),
        ),
    ):
        yield Case(name, f"{num_rows} rows, all new", run, twin, num_bytes)


def cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Every op under every load of a shape."""
    for num_tokens in (*shape.batches, shape.prefill):
        yield from norm_cases(shape, num_tokens, dtype)
        yield from linear_cases(shape, num_tokens, dtype)
        yield from epilogue_cases(shape, num_tokens, dtype)
        matrices = ((shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden))
        for case in quantised.cpu_cases(matrices, num_tokens, dtype):
            yield Case(*case)
        sizes = shape.hidden, shape.intermediate, num_tokens, dtype
        yield from (Case(*case) for case in experts.cpu_cases(*sizes))
        yield from rope_cases(shape, num_tokens, dtype)
        yield from activation_cases(shape, num_tokens, dtype)
    yield from attention_cases(shape, dtype)
    yield from latent_cases(shape, dtype)
    for batch in shape.batches:
        yield from sample_cases(shape, batch)
        yield from bitmask_cases(batch, shape.vocab_size, dtype)
        yield from logprobs_cases(batch, shape.vocab_size, dtype)
        yield from step_cases(shape, batch)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    build.load_native(is_reference_allowed=False, progress=print, device=args.device)
    if args.device == "cuda":
        figures = gpu_ops.run(args.only, args.seconds)
        write_json(args.json, {**figures, **environment(["torch"])})
        sys.exit(1 if figures["errors"] else 0)
    machine = Cpu(args.seconds)
    gflops = {dtype: gemm_gflops(machine, dtype) for dtype in DTYPES.values()}
    print(busy_remark(), end="")
    rates = ", ".join(f"{str(dtype)[6:]} {rate:.0f}" for dtype, rate in gflops.items())
    print(f"{args.threads} threads, matrix product in GFLOP/s: {rates}")
    results: list[dict[str, Any]] = []
    for name in args.shapes:
        rows = [["op", "load", "us", "GB/s", "floor us", "ratio", "twin us"]]
        for case in cases(SHAPES[name], DTYPES[args.dtype]):
            if not any(part in case.op for part in args.only):
                continue
            result = measure(case, machine, gflops)
            results.append({"shape": name, **asdict(result)})
            times = (result.us, result.gb_per_s, result.floor_us, result.ratio, result.twin_us)
            rows.append([case.op, case.load, *(f"{value:,.2f}" for value in times)])
        print(f"\n{name}, {args.dtype}\n{format_table(rows)}", flush=True)
    settings = {"threads": args.threads, "wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    write_json(args.json, {"settings": settings, "results": results, **environment(["torch"])})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, help="(bfloat16, the only one on a card)")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="(all; of a CPU)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""])
    parser.add_argument("--seconds", type=float, help="for each figure (0.2; on a card 0.1)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    args = parser.parse_args(argv)
    if args.seconds is None:
        args.seconds = 0.1 if args.device == "cuda" else 0.2
    if args.device == "cuda" and (args.dtype not in (None, "bfloat16") or args.shapes):
        parser.error("--device cuda measures the shapes of gpu_ops.py in bfloat16")
    args.dtype, args.shapes = args.dtype or "bfloat16", args.shapes or [*SHAPES]
    for name in args.shapes:
        if name not in SHAPES:
            parser.error(f"--shapes {name}: choose from {', '.join(SHAPES)}")
    return args


if __name__ == "__main__":
    main()
