"""Every op once, small enough for compute-sanitizer: its result is that of its plain-torch twin.

What is exact about an op, odd shapes and limits are in the file of its topic.
"""

from __future__ import annotations

import struct
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import attention_plan, reference, sample_workspace
from pyserve.ops import step_layout as layout

pytestmark = pytest.mark.sanitize
DEVICE = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]
MAX_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # ||x - twin|| / ||twin||
EPS = 1e-5
BLOCK_SIZE = 16


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype, device=DEVICE)


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def assert_close(actual: Tensor, twin: Tensor) -> None:
    error = (actual.double() - twin.double()).norm() / twin.double().norm()
    assert error <= MAX_ERROR[actual.dtype]  # false for NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [256, 4096, 100])
def test_norms(dtype: torch.dtype, hidden: int) -> None:
    x, weight = randn(3, hidden, dtype=dtype), randn(hidden, dtype=dtype)
    residual = randn(3, hidden + 1, dtype=dtype)[:, :hidden].contiguous()
    twin = nan(3, hidden, dtype=dtype)
    reference.rms_norm(x, weight, EPS, twin)
    assert_close(ops.rms_norm(x, weight, EPS), twin)
    twin_residual = residual.clone()
    reference.add_rms_norm(x, twin_residual, weight, EPS, twin)
    assert_close(ops.add_rms_norm(x, residual, weight, EPS), twin)
    assert_close(residual, twin_residual)
    reference.rms_norm(x, weight, EPS, twin, 1.0)
    assert_close(ops.rms_norm(x, weight, EPS, offset=1.0), twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [192, 14336, 50])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = randn(3, 2 * size, dtype=dtype)
    twin = nan(3, size, dtype=dtype)
    reference.silu_mul(gate_up, twin)
    assert_close(ops.silu_mul(gate_up), twin)
    reference.gelu_tanh_mul(gate_up, twin)
    assert_close(ops.gelu_tanh_mul(gate_up), twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 9, 30])
@pytest.mark.parametrize(("n", "k"), [(96, 256), (40, 1024), (33, 72)])
def test_linear(dtype: torch.dtype, num_rows: int, n: int, k: int) -> None:
    x, weight = randn(num_rows, k, dtype=dtype), randn(n, k, dtype=dtype)
    bias = randn(n, dtype=dtype) if num_rows % 2 == 0 else None
    out, twin = nan(num_rows, n, dtype=dtype), nan(num_rows, n, dtype=dtype)
    torch.ops.pyserve.linear.default(x, weight, bias, out)
    reference.linear(x, weight, bias, twin)
    assert_close(out, twin)
    residual = randn(num_rows, n + 1, dtype=dtype)[:, :n]
    twin.copy_(residual)
    torch.ops.pyserve.linear_add.default(x, weight, bias, residual)
    reference.linear_add(x, weight, bias, twin)
    assert_close(residual, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 9, 30])
@pytest.mark.parametrize(("n", "k"), [(96, 256), (40, 1024), (33, 72)])
def test_linear_silu_mul(dtype: torch.dtype, num_rows: int, n: int, k: int) -> None:
    x, weight = randn(num_rows, k, dtype=dtype), randn(2 * n, k, dtype=dtype) / 8
    bias = randn(2 * n, dtype=dtype) if num_rows % 2 == 0 else None
    out, twin = nan(num_rows, n, dtype=dtype), nan(num_rows, n, dtype=dtype)
    torch.ops.pyserve.linear_silu_mul.default(x, weight, bias, out)
    reference.linear_silu_mul(x, weight, bias, twin)
    assert_close(out, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "qk norm"])
def test_rope_write_kv(dtype: torch.dtype, head_dim: int, has_norm: bool) -> None:
    num_heads, num_kv_heads, num_tokens = 4, 2, 5
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(40, head_dim // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    norms: tuple[Tensor | None, Tensor | None] = (
        (randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)) if has_norm else (None, None)
    )
    shape = (4, BLOCK_SIZE, num_kv_heads, head_dim)
    positions, slots = ints(0, 7, 39, 1, 0), ints(3, 63, 0, 17, -1, dtype=torch.int64)
    results = []
    scales = torch.rand(40, device=DEVICE) + 0.5 if has_norm else None
    for op in (torch.ops.pyserve.rope_write_kv.default, reference.rope_write_kv):
        rotated = qkv.clone()
        keys, values = (torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        op(
            rotated, positions, cos_sin, slots, *norms, EPS, num_heads, num_kv_heads, keys, values,
            1.0, scales,
        )  # fmt: skip
        results.append((rotated, keys, values))
    for actual, twin in zip(*results, strict=True):
        assert_close(actual, twin)


ROWS = {  # (query_len, seq_len) of each row
    "decode": [(1, 1), (1, 70), (1, 200)],
    "long decode": [(1, 3000)],
    "prefill": [(130, 130), (3, 3)],
    "chunk": [(40, 300)],
    "mixed": [(1, 65), (50, 180), (1, 17), (2, 33)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (7, 1)])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("rows", ROWS)
def test_attention(
    dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, window: int, rows: str
) -> None:
    assert_attention(rows, (num_heads, num_kv_heads, head_dim), window, 0.0, dtype)


@pytest.mark.parametrize("head_dim", [96, 128, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_capped_attention(head_dim: int, rows: str) -> None:
    assert_attention(rows, (4, 2, head_dim), 50, 1.5, torch.bfloat16)


def assert_attention(
    rows: str, heads: tuple[int, int, int], window: int, softcap: float, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    query_lens = [query_len for query_len, _ in ROWS[rows]]
    lens = [seq_len for _, seq_len in ROWS[rows]]
    num_rows, num_tokens = len(lens), sum(query_lens)
    num_blocks = [-(-seq_len // BLOCK_SIZE) for seq_len in lens]
    ids = torch.randperm(sum(num_blocks)).int().split(num_blocks)
    table = torch.zeros(num_rows, max(num_blocks), dtype=torch.int32)
    for row, part in enumerate(ids):
        table[row, : len(part)] = part
    shape = (sum(num_blocks), BLOCK_SIZE, num_kv_heads, head_dim)
    # One padded row: no slot, no tokens.
    starts, seq_lens = ints(0, *accumulate(query_lens), num_tokens), ints(*lens, 0)
    plan = attention_plan.allocate(
        num_tokens, num_rows + 1, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, device=DEVICE,
    )  # fmt: skip
    ops.plan_attention(
        starts, seq_lens, plan, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window
    )
    inputs = (
        randn(num_tokens, num_heads, head_dim, dtype=dtype), randn(*shape, dtype=dtype),
        randn(*shape, dtype=dtype) + 1, table.to(DEVICE), ints(*range(num_rows), -1), starts,
        seq_lens,
    )  # fmt: skip
    scale = head_dim**-0.5
    twin = nan(num_tokens, num_heads, head_dim, dtype=dtype)
    reference.paged_attention(*inputs, scale, window, num_tokens, None, None, twin, softcap)
    for _ in range(2):  # the workspace must be usable again
        actual = ops.paged_attention(
            *inputs, softmax_scale=scale, window=window, max_query_len=max(query_lens), plan=plan,
            softcap=softcap,
        )  # fmt: skip
        assert_close(actual, twin)


def test_plan_step() -> None:
    num_slots, query_lens, ids = 4, [3, 1, 20], [2, 0, 3]
    buffer = np.zeros(400, dtype=np.int32)
    neutral = struct.pack("<16i", *[0] * 5, 0x3F800000, 0, 0, 0x3F800000, *[0] * 7)
    num_words = ops.pack_step(
        buffer, ids, query_lens, [list(range(n)) for n in query_lens], [True, False, True],
        [2, 0, 5, 0, 0, 6, 3, 0, 7, 3, 1, 8],
        [struct.pack("<4i", 20, slot, 0, 0) + neutral for slot in ids],
    )  # fmt: skip
    results = []
    for op in (torch.ops.pyserve.plan_step.default, reference.plan_step):
        slots = torch.zeros(num_slots, layout.SLOT_WORDS, dtype=torch.int32, device=DEVICE)
        table = torch.zeros(num_slots, 4, dtype=torch.int32, device=DEVICE)
        counts = torch.zeros(num_slots, 100, dtype=torch.int16, device=DEVICE)
        plan = ops.StepPlan.allocate(32, 4, DEVICE)
        outputs = [tensor.fill_(-7) for tensor in plan]
        op(torch.from_numpy(buffer[:num_words]).to(DEVICE), slots, table, counts, 16, *outputs)
        results.append((slots, table, counts, *outputs))
    for actual, twin in zip(*results, strict=True):
        assert torch.equal(actual, twin)


SAMPLERS: dict[str, dict[int, float]] = {
    "greedy": {},
    "temperature": {layout.SLOT_TEMPERATURE: 0.8},
    "top-k": {layout.SLOT_TEMPERATURE: 0.8, layout.SLOT_TOP_K: 5},
    "top-k and top-p": {
        layout.SLOT_TEMPERATURE: 0.8, layout.SLOT_TOP_K: 50, layout.SLOT_TOP_P: 0.9,
    },
    "top-p": {layout.SLOT_TEMPERATURE: 1.3, layout.SLOT_TOP_P: 0.95},
    "min-p": {layout.SLOT_TEMPERATURE: 0.8, layout.SLOT_MIN_P: 0.05},
    "penalties": {layout.SLOT_HAS_PENALTIES: 1, layout.SLOT_FREQUENCY_PENALTY: 1.5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(3, 2048), (1, 32001)])
def test_sample(dtype: torch.dtype, sampler: str, num_rows: int, vocab_size: int) -> None:
    logits = randn(num_rows, vocab_size, dtype=dtype) * 4
    # A padded row too.
    rows = torch.arange(num_rows + 1, dtype=torch.int32, device=DEVICE)
    rows[-1] = -1
    logits = torch.cat((logits, logits[:1]))
    slots = torch.zeros(num_rows, layout.SLOT_WORDS, dtype=torch.int32, device=DEVICE)
    real = slots.view(torch.float32)
    real[:, [layout.SLOT_TOP_P, layout.SLOT_REPETITION_PENALTY]] = 1.0
    for word, value in SAMPLERS[sampler].items():
        if word in (layout.SLOT_TOP_K, layout.SLOT_HAS_PENALTIES):
            slots[:, word] = int(value)
        else:
            real[:, word] = value
    slots[:, layout.SLOT_SEED_LOW] = rows[:-1] + 11
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int16, device=DEVICE)
    twin_slots, twin_counts = slots.clone(), counts.clone()
    twin = torch.full_like(rows, -9)
    reference.sample(logits, rows, twin_slots, twin_counts, None, twin)
    workspace = sample_workspace.allocate(num_rows + 1, vocab_size, device=DEVICE)
    sampled = ops.sample(
        logits, rows, slots, counts, workspace=workspace, out=torch.full_like(rows, -9)
    )
    assert torch.equal(sampled, twin)
    assert torch.equal(slots, twin_slots) and torch.equal(counts, twin_counts)
