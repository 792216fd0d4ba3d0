"""Every op on an NVIDIA card against its floor: `python -m bench.ops --device cuda`.

Ceilings are measured first, on the same card: a device-to-device copy of several GB, bytes read
plus written, and an 8192^3 bfloat16 matrix product. A floor is the bytes an op must move over the
one, or the multiply-adds it must do over the other, whichever is longer.
Calls are captured in a CUDA graph, so that launches cost what they cost in one, over so many copies
of the inputs that the L2 cache holds no answer; where that would take more than MAX_SETS copies
(activations of a few rows, which come from L2 in a real step too) it is those. `us` is the median
over replays of a graph, divided by its calls; `+-` half the distance from the 10th to the 90th
percentile. Data is random. From sm_90 on a call may begin while the one before it ends, in a graph
of one op as well: what an op costs in a step, the chains of gpu_chains.py tell.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench import experts, gpu_attention, gpu_chains, gpu_rows, latent, quantised, w4a16, w8a8
from bench.gpu_timing import copy_us, time_sets
from bench.report import format_table
from pyserve import ops
from pyserve.ops import sample_workspace
from pyserve.ops import step_layout as layout

DEVICE = torch.device("cuda")
BLOCK_SIZE = 16
ROTATED_BYTES = 256 * 2**20  # more than four times an H200's L2
MAX_SETS = 48
COPY_BYTES = 4 * 2**30
GEMM_SIZE = 8192
VOCAB_SIZE = 128256
HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
MATRICES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
    "lm_head": (128256, 4096),
}  # fmt: skip
ROWS = (8192, 64, 1)
CHAIN_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256, 384)
LAYERS = ((1, 512), (8, 512), (16, 512), (64, 384), (256, 384))  # rows, context of each
DECODES = ((8, 32768), (16, 4096), (64, 1024), (256, 512), (1, 1024))
PREFILLS = {
    "prefill 8192": [(8192, 8192)],
    "prefill 512 on 32768": [(512, 32768)],
    "prefill 8 x 1024": [(1024, 1024)] * 8,
    "mixed: 512 of 4096, 64 x 1024": [(512, 4096)] + [(1, 1024)] * 64,
}
# Of models whose heads are not Llama's: what one decodes.
OTHER_HEADS = {
    gpu_attention.Heads(16, 8, 256, 50.0, "Gemma-2-9B"): ((8, 8192), (64, 1024), (1, 1024)),
    gpu_attention.Heads(32, 16, 128, 50.0, "Gemma-2-27B"): ((8, 8192), (1, 1024)),
    gpu_attention.Heads(32, 32, 96, 0.0, "Phi-3-mini"): ((8, 4096), (1, 1024)),
}
OTHER_PREFILL = 8192
TARGETS = {
    "decode 8 x 32768": ("%", 80.0),
    "decode 16 x 4096": ("%", 65.0),
    "prefill 8192": ("TFLOP/s", 520.0),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One op under one load: `sets` do the same to different memory.

    target  (unit, bound): "%" of the floor's ceiling or "TFLOP/s" at least, "us" at most.
    """

    op: str
    load: str
    sets: list[Callable[[], object]]
    num_bytes: int
    num_flops: int = 0
    target: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on this card."""

    bytes_per_us: float
    flops_per_us: float


def measure_ceilings(seconds: float) -> Ceilings:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    copy_time_us = copy_us(torch.empty_like(source), source)
    del source
    a, b = _randn(GEMM_SIZE, GEMM_SIZE), _randn(GEMM_SIZE, GEMM_SIZE)
    gemm = time_sets([partial(torch.mm, a, b)], seconds)
    return Ceilings(2 * COPY_BYTES / copy_time_us, 2 * GEMM_SIZE**3 / gemm.us)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def _ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def num_sets(num_bytes: int) -> int:
    return max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))


def norm_cases() -> Iterator[Case]:
    weight = _randn(HIDDEN)
    for num_tokens in ROWS:
        size = num_tokens * HIDDEN * 2
        target = ("%", 80.0) if num_tokens == ROWS[0] else None
        xs = [_randn(num_tokens, HIDDEN) for _ in range(num_sets(2 * size))]
        runs: list[Callable[[], object]] = [partial(ops.rms_norm, x, weight, 1e-5) for x in xs]
        yield Case("rms_norm", f"{num_tokens} x {HIDDEN}", runs, 2 * size, target=target)
        # Zeros added: the residual stays what it is, however often this runs.
        adds = [torch.zeros_like(x) for x in xs]
        runs = [
            partial(ops.add_rms_norm, add, x, weight, 1e-5) for add, x in zip(adds, xs, strict=True)
        ]
        yield Case("add_rms_norm", f"{num_tokens} x {HIDDEN}", runs, 4 * size)


def rope_cases() -> Iterator[Case]:
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    for num_tokens in ROWS:
        num_blocks = -(-num_tokens // BLOCK_SIZE) + 1
        angles = torch.rand(num_tokens, HEAD_DIM // 2, device=DEVICE)
        cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
        positions = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
        slots = torch.randperm(num_tokens, device=DEVICE)
        num_bytes = 2 * num_tokens * width * 2 + cos_sin.nbytes
        runs: list[Callable[[], object]] = []
        for _ in range(num_sets(num_bytes)):
            cache = _randn(2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
            runs.append(
                partial(
                    ops.rope_write_kv, _randn(num_tokens, width), positions, cos_sin, slots,
                    cache[0], cache[1], num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS,
                )
            )  # fmt: skip
        yield Case("rope_write_kv", f"{num_tokens} x (32 + 2 x 8) x 128", runs, num_bytes)


def activation_cases() -> Iterator[Case]:
    for num_tokens in ROWS:
        num_bytes = 3 * num_tokens * INTERMEDIATE * 2
        inputs = [_randn(num_tokens, 2 * INTERMEDIATE) for _ in range(num_sets(num_bytes))]
        for op in (ops.silu_mul, ops.gelu_tanh_mul):
            runs: list[Callable[[], object]] = [partial(op, x) for x in inputs]
            yield Case(op.__name__, f"{num_tokens} x {INTERMEDIATE}", runs, num_bytes)


def _own_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.ops.pyserve.linear.default(x, weight, None, out)


def linear_cases() -> Iterator[Case]:
    """Our op at more rows than `ops.linear` gives it, and cuBLAS: where do they cross?"""
    for name, (n, k) in MATRICES.items():
        weights = [_randn(n, k) for _ in range(num_sets(n * k * 2))]
        for num_rows in (1, 2, 4, 8, 16, 32, 64):
            num_bytes = n * k * 2 + num_rows * (n + k) * 2
            xs = [_randn(num_rows, k) for _ in weights]
            out = torch.empty(num_rows, n, dtype=torch.bfloat16, device=DEVICE)
            pairs = list(zip(xs, weights, strict=True))
            own: list[Callable[[], object]] = [partial(_own_linear, x, w, out) for x, w in pairs]
            other: list[Callable[[], object]] = [partial(functional.linear, x, w) for x, w in pairs]
            load = f"{num_rows} x {k} -> {n} ({name})"
            yield Case("linear", load, own, num_bytes, 2 * num_rows * n * k)
            yield Case("  cuBLAS", load, other, num_bytes, 2 * num_rows * n * k)


def epilogue_cases() -> Iterator[Case]:
    """A layer's last two products with what follows, as `ops` has it done; of many rows by two."""
    for num_rows in (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        num_bytes = 2 * (HIDDEN * INTERMEDIATE + num_rows * (INTERMEDIATE + 2 * HIDDEN))
        num_flops = 2 * num_rows * HIDDEN * INTERMEDIATE
        residual, x = torch.zeros_like(_randn(num_rows, HIDDEN)), _randn(num_rows, INTERMEDIATE)
        runs: list[Callable[[], object]] = [
            partial(ops.linear_add, x, _randn(HIDDEN, INTERMEDIATE), None, residual)
            for _ in range(num_sets(num_bytes))
        ]
        load = f"{num_rows} x {INTERMEDIATE} -> {HIDDEN} (down)"
        yield Case("linear_add", load, runs, num_bytes, num_flops)
        num_bytes += 2 * HIDDEN * INTERMEDIATE
        x, gate_up = _randn(num_rows, HIDDEN), _randn(num_rows, 2 * INTERMEDIATE)
        out = torch.empty_like(gate_up[:, :INTERMEDIATE]).contiguous()
        weights = [_randn(2 * INTERMEDIATE, HIDDEN) for _ in range(num_sets(num_bytes))]
        runs = [partial(ops.linear_silu_mul, x, w, None, out, gate_up) for w in weights]
        load = f"{num_rows} x {HIDDEN} -> {INTERMEDIATE} (gate_up)"
        yield Case("linear_silu_mul", load, runs, num_bytes, 2 * num_flops)
        if num_rows >= 512:
            runs = [partial(_two_calls, x, w, gate_up, out) for w in weights]
            yield Case("  cuBLAS and silu_mul", load, runs, num_bytes, 2 * num_flops)


def _two_calls(x: Tensor, weight: Tensor, gate_up: Tensor, out: Tensor) -> None:
    functional.linear(x, weight, out=gate_up)  # type: ignore[call-arg]
    ops.silu_mul(gate_up, out)


def attention_cases() -> Iterator[Case]:
    """Of an 8B layer; then of head sizes that other models have."""
    decodes = {f"decode {batch} x {length}": [(1, length)] * batch for batch, length in DECODES}
    heads = gpu_attention.Heads(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
    make = partial(gpu_attention.attention_chain, device=DEVICE, num_sets=num_sets)
    loads = {**decodes, **PREFILLS}
    yield from cases_of(make(heads, name, rows, TARGETS.get(name)) for name, rows in loads.items())
    yield from cases_of(make(heads, *load, has_rope=True) for load in decodes.items())
    for other, decode_loads in OTHER_HEADS.items():
        loads = {f"decode {n} x {length}": [(1, length)] * n for n, length in decode_loads}
        loads[f"prefill {OTHER_PREFILL}"] = [(OTHER_PREFILL, OTHER_PREFILL)]
        yield from cases_of(
            make(other, f"{other.name}: {name}", rows) for name, rows in loads.items()
        )


SAMPLERS: dict[str, dict[int, float]] = {
    "greedy": {},
    "temperature": {layout.SLOT_TEMPERATURE: 0.8},
    "top-k 50, top-p 0.9": {
        layout.SLOT_TEMPERATURE: 0.8, layout.SLOT_TOP_K: 50, layout.SLOT_TOP_P: 0.9,
    },
    "top-p 0.9": {layout.SLOT_TEMPERATURE: 0.8, layout.SLOT_TOP_P: 0.9},
}  # fmt: skip


def sample_cases() -> Iterator[Case]:
    """Peaked logits, as a trained model's: 20 tokens hold most of the mass; top-p on flat ones too:
    nearly the whole vocabulary is in the nucleus, in which few or all may weigh the same."""
    for num_rows in (256, 64, 1):
        ids = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        counts = torch.zeros(num_rows, VOCAB_SIZE, dtype=torch.int16, device=DEVICE)
        workspace = sample_workspace.allocate(num_rows, VOCAB_SIZE, device=counts.device)
        flat = [_randn(num_rows, VOCAB_SIZE) for _ in range(num_sets(num_rows * VOCAB_SIZE * 2))]
        peaked = [logits * 2 for logits in flat]
        flatter = [logits * 0.1 for logits in flat[:1]]
        equal = [torch.zeros_like(logits) for logits in flat[:1]]
        for sharp in peaked:
            sharp[:, :20] += torch.linspace(12, 4, 20, device=DEVICE)
        for name, words in SAMPLERS.items():
            kinds = {"": peaked, ", flat": flat, ", flatter": flatter, ", equal": equal}
            for kind, logits in kinds.items():
                if kind and name != "top-p 0.9":
                    continue
                slots = _slots(num_rows, words)
                runs: list[Callable[[], object]] = [
                    partial(ops.sample, x, ids, slots, counts, workspace=workspace) for x in logits
                ]
                target = ("us", 300.0) if num_rows == 256 and "top-k" in name else None
                load = f"{num_rows} x {VOCAB_SIZE}, {name}{kind}"
                yield Case("sample", load, runs, logits[0].nbytes, target=target)


def bitmask_cases() -> Iterator[Case]:
    """A grammar allows a few tokens or nearly all; only what becomes -inf is written."""
    for num_rows in (64, 1):
        count = num_sets(num_rows * VOCAB_SIZE * 2)
        logits = [_randn(num_rows, VOCAB_SIZE) for _ in range(count)]
        rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        bits = 1 << torch.arange(32, device=DEVICE)
        for name, share in (("0.1 % allowed", 0.001), ("99 % allowed", 0.99)):
            is_allowed = torch.rand(num_rows, VOCAB_SIZE // 32, 32, device=DEVICE) < share
            mask = torch.where(is_allowed, bits, 0).sum(-1).int()
            runs: list[Callable[[], object]] = [
                partial(ops.apply_bitmask, x, mask, rows) for x in logits
            ]
            num_bytes = mask.nbytes + 2 * int((~is_allowed).sum())
            yield Case("apply_bitmask", f"{num_rows} x {VOCAB_SIZE}, {name}", runs, num_bytes)


def logprobs_cases() -> Iterator[Case]:
    """Every row asks."""
    for num_rows in (64, 1):
        count = num_sets(num_rows * VOCAB_SIZE * 2)
        logits = [_randn(num_rows, VOCAB_SIZE) for _ in range(count)]
        rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        words = torch.zeros(num_rows, ops.LOGPROB_WORDS, dtype=torch.int32, device=DEVICE)
        out = ops.LogprobRows.of(words)
        runs: list[Callable[[], object]] = [
            partial(ops.logprobs, x, rows, rows, out) for x in logits
        ]
        num_bytes = logits[0].nbytes + words.nbytes
        yield Case("logprobs", f"{num_rows} x {VOCAB_SIZE}", runs, num_bytes)


def _slots(num_slots: int, words: dict[int, float]) -> Tensor:
    slots = torch.zeros(num_slots, layout.SLOT_WORDS, dtype=torch.int32)
    real = slots.view(torch.float32)
    real[:, [layout.SLOT_TOP_P, layout.SLOT_REPETITION_PENALTY]] = 1.0
    for word, value in words.items():
        if word == layout.SLOT_TOP_K:
            slots[:, word] = int(value)
        else:
            real[:, word] = value
    slots[:, layout.SLOT_SEED_LOW] = torch.arange(num_slots, dtype=torch.int32)
    return slots.to(DEVICE)


def plan_cases() -> Iterator[Case]:
    """Each step admits its rows, and so sets its slots again: it can be run any number of times."""
    loads = {"256 rows admitted": [1] * 256, "8192 tokens, 8 rows admitted": [1024] * 8}
    for load, query_lens in loads.items():
        num_rows, num_tokens = len(query_lens), sum(query_lens)
        buffer = np.zeros(2 * num_tokens + 64 * num_rows + 64, dtype=np.int32)
        ids = list(range(num_rows))
        neutral = struct.pack("<16i", *[0] * 5, 0x3F800000, 0, 0, 0x3F800000, *[0] * 7)
        num_words = ops.pack_step(
            buffer, ids, query_lens, [[7] * query_len for query_len in query_lens],
            [True] * num_rows, [word for slot in ids for word in (slot, 0, slot)],
            [struct.pack("<4i", 20, slot, 0, 0) + neutral for slot in ids],
        )  # fmt: skip
        words = torch.from_numpy(buffer[:num_words]).to(DEVICE)
        plan = ops.StepPlan.allocate(num_tokens, num_rows, words.device)
        table = torch.zeros(num_rows, 512, dtype=torch.int32, device=DEVICE)
        counts = torch.zeros(num_rows, VOCAB_SIZE, dtype=torch.int16, device=DEVICE)
        slots = _slots(num_rows, {})
        run = partial(ops.plan_step, words, slots, table, counts, BLOCK_SIZE, plan)
        num_bytes = words.nbytes + 16 * num_tokens + 24 * num_rows
        yield Case("plan_step", load, [run], num_bytes)
        heads = gpu_attention.Heads(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
        rows = gpu_attention.Rows.of([(query_len, 1024) for query_len in query_lens], heads, DEVICE)
        yield Case("plan_attention", load, [rows.plan_attention], 8 * num_rows)


def _layer_shape() -> gpu_chains.Shape:
    return gpu_chains.Shape(HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, DEVICE)


def cases_of(chains: Iterable[gpu_chains.Chain]) -> Iterator[Case]:
    for chain in chains:
        size = chain.num_bytes, chain.num_flops
        yield Case(chain.name, chain.load, chain.runs, *size, chain.target)


def chain_cases() -> Iterator[Case]:
    """At 1 row a layer's matrices are read at 90 % of what a copy moves, or faster."""
    shape = _layer_shape()
    linears = gpu_chains.linear_chains(shape, CHAIN_ROWS)
    for chain in itertools.chain(linears, gpu_chains.layer_chains(shape, LAYERS)):
        target = ("%", 90.0) if chain.load.startswith("1 rows") else None
        yield Case(chain.name, chain.load, chain.runs, chain.num_bytes, chain.num_flops, target)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "norm": norm_cases,
    "rope": rope_cases,
    "activation": activation_cases,
    "linear": linear_cases,
    "linear_epilogues": epilogue_cases,
    "w4a16": lambda: cases_of(w4a16.products(MATRICES, DEVICE, num_sets)),
    "int4_tilings": lambda: cases_of(w4a16.tilings(MATRICES, DEVICE, num_sets)),
    "int4_prompts": lambda: cases_of(w4a16.prompts(MATRICES, DEVICE, num_sets)),
    "fp8": lambda: cases_of(
        itertools.chain(
            quantised.fp8_products(MATRICES, DEVICE, num_sets), quantised.fp8_experts(DEVICE)
        )
    ),
    "w8a8": lambda: cases_of(w8a8.products(MATRICES, DEVICE, num_sets)),
    "e4m3_tilings": lambda: cases_of(w8a8.tilings(MATRICES, DEVICE, num_sets)),
    "experts": lambda: cases_of(experts.chains(DEVICE)),
    "int4_experts": lambda: cases_of(experts.integer_chains(DEVICE)),
    "latent": lambda: cases_of(latent.chains(DEVICE)),
    "chain": chain_cases,
    "few_rows": lambda: cases_of(gpu_rows.few_row_chains(_layer_shape())),
    "sample": sample_cases,
    "bitmask": bitmask_cases,
    "logprobs": logprobs_cases,
    "plan": plan_cases,
}


def measure(case: Case, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """Figures of a case; percent is of the floor, so 100 is the ceiling of this card."""
    timing = time_sets(case.sets, seconds)
    bytes_us = case.num_bytes / ceilings.bytes_per_us
    flops_us = case.num_flops / ceilings.flops_per_us
    floor_us = max(bytes_us, flops_us)
    return {
        "op": case.op.strip(),
        "load": case.load,
        **asdict(timing),
        "floor_us": floor_us,
        "is_compute": flops_us > bytes_us,
        "gb_per_s": case.num_bytes / timing.us / 1e3,
        "tflops": case.num_flops / timing.us / 1e6,
        "percent": 100 * floor_us / timing.us,
        "ratio": timing.us / floor_us,
    }


def verdict(case: Case, figures: dict[str, Any]) -> str | None:
    """The line of a case that has a target."""
    if case.target is None:
        return None
    unit, bound = case.target
    value = {"%": figures["percent"], "TFLOP/s": figures["tflops"], "us": figures["us"]}[unit]
    is_met = value <= bound if unit == "us" else value >= bound
    sign = "<=" if unit == "us" else ">="
    return (
        f"= {case.op} {case.load}: {value:.0f} {unit} (target {sign} {bound:.0f}): "
        f"{'met' if is_met else 'MISSED'}"
    )


def run(only: Sequence[str], seconds: float) -> dict[str, Any]:
    """Measure and print; an op that raises is named in "errors", and ends its group only."""
    torch.manual_seed(0)
    ceilings = measure_ceilings(4 * seconds)
    line = (
        f"copy {ceilings.bytes_per_us / 1e6:.2f} TB/s, "
        f"bf16 {GEMM_SIZE}^3 GEMM {ceilings.flops_per_us / 1e6:.0f} TFLOP/s"
    )
    print(f"= {line}", flush=True)
    results: list[dict[str, Any]] = []
    errors: list[str] = []
    for name, cases in GROUPS.items():
        if not any(part in name for part in only):
            continue
        rows = [[name, "load", "floor us", "us", "+-", "GB/s", "TFLOP/s", "% of floor", "ratio"]]
        verdicts = []
        try:
            for case in cases():
                figures = measure(case, ceilings, seconds)
                results.append(figures)
                values = [figures["floor_us"], figures["us"], figures["spread_us"]]
                rows.append(
                    [
                        case.op, case.load, *(f"{value:,.1f}" for value in values),
                        f"{figures['gb_per_s']:,.0f}", f"{figures['tflops']:,.0f}",
                        f"{figures['percent']:.0f}{'' if figures['is_graph'] else ' no graph'}",
                        f"{figures['ratio']:.2f}",
                    ]
                )  # fmt: skip
                # Now, as a run that is cut off never comes to its table.
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
                verdicts.append(verdict(case, figures))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            print(f"FAILED {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            results.append({"op": name, "error": str(error)})
            errors.append(name)
        print(f"\n{format_table(rows)}")
        for text in filter(None, verdicts):
            print(text, flush=True)
        if is_lost():
            print("FAILED: the card takes no more work in this process")
            break
    gpu_rows.print_crossing(results, MATRICES, "linear", "cuBLAS")
    gpu_rows.print_crossing(results, MATRICES, w4a16.OWN, "linear_w4a16")
    gpu_rows.print_winners(results)
    return {"ceilings": asdict(ceilings), "results": results, "errors": errors}


def is_lost() -> bool:
    """True after a CUDA error, of which a process never recovers; frees what is only kept."""
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
