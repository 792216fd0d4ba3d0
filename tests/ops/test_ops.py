"""Schemas, fakes and opcheck of every op, and the wrappers' plan of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyserve import limits, ops
from pyserve.ops import fakes, reference, w4a16
from pyserve.ops import step_layout as layout


def _int(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def op_args() -> dict[str, tuple[Any, ...]]:
    """Arguments of one small valid call of each op."""
    cache = torch.randn(2, 4, 16, 2, 8)
    header = torch.zeros(layout.HEADER_WORDS, dtype=torch.int32)
    header[layout.HEADER_MAGIC] = layout.STEP_MAGIC
    header[layout.HEADER_NUM_WORDS] = layout.HEADER_WORDS
    for word in (
        layout.HEADER_ROWS_OFFSET,
        layout.HEADER_TOKENS_OFFSET,
        layout.HEADER_BLOCK_UPDATES_OFFSET,
        layout.HEADER_SLOT_UPDATES_OFFSET,
    ):
        header[word] = layout.HEADER_WORDS
    slots = torch.zeros(3, layout.SLOT_WORDS, dtype=torch.int32)
    counts = torch.zeros(3, 20, dtype=torch.int16)
    table = torch.zeros(3, 2, dtype=torch.int32)
    x = torch.randn(2, 3, 24)
    return {
        "rms_norm": (x, torch.randn(24), 1e-6, torch.empty_like(x), 0.5),
        "add_rms_norm": (
            x, torch.randn(2, 3, 24), torch.randn(24), 1e-6, torch.empty_like(x), 0.5,
            torch.randn(24),
        ),
        "rope_write_kv": (
            torch.randn(3, 8 * 8), _int(0, 1, 2), torch.randn(9, 8), torch.tensor([5, -1, 17]),
            torch.randn(8), None, 1e-6, 4, 2, cache[0], cache[1], 1.0, torch.rand(9),
        ),
        "linear": (
            torch.randn(3, 24), torch.randn(5, 24), torch.randn(5), torch.empty(3, 5),
            20 * (torch.rand(3, 2) + 1), 1e-5,
        ),
        "linear_add": (
            torch.randn(3, 24), torch.randn(5, 24), torch.randn(5), torch.randn(3, 5),
            torch.randn(5), torch.empty(3, 5), torch.empty(3, 1),
        ),
        "linear_silu_mul": (
            torch.randn(3, 24), torch.randn(10, 24), torch.randn(10), torch.empty(3, 5),
            20 * (torch.rand(3, 2) + 1), 1e-5,
        ),
        **_args_of_quantised(),
        **_args_of_adapters(),
        "silu_mul": (torch.randn(3, 20), torch.empty(3, 10)),
        "gelu_tanh_mul": (torch.randn(3, 20), torch.empty(3, 10)),
        "paged_attention": (
            torch.randn(3, 4, 8), cache[0], cache[1], table, _int(1, 0, -1), _int(0, 1, 3, 3),
            _int(9, 2, 0), 0.3, 0, 3, None, None, torch.empty(3, 4, 8), 2.0,
        ),
        "plan_step": (
            header,
            slots,
            table,
            counts,
            16,
            _int(1, 1),
            _int(1, 1),
            torch.tensor([1, 1]),
            _int(1),
            _int(1, 1),
            _int(1),
            torch.ones(1, 2, dtype=torch.int32),
        ),
        "sample": (torch.randn(2, 20), _int(1, -1), slots, counts, None, _int(9, 9)),
        "apply_bitmask": (torch.randn(3, 40), _int(5, -1, -2, 3).view(2, 2), _int(2, -1)),
        "logprobs": (
            torch.randn(3, 40),
            _int(2, -1),
            _int(7, 8, 9),
            True,
            torch.ones(2),
            _int(5, 5),
            torch.ones(2, limits.TOP_LOGPROBS, dtype=torch.int32),
            torch.ones(2, limits.TOP_LOGPROBS),
        ),
    } | _experts_args() | _latent_args()  # fmt: skip


def _latent_args() -> dict[str, tuple[Any, ...]]:
    cache = torch.randn(4, 16, 24)
    return {
        "rope_write_latent": (
            torch.randn(3, 4, 8), torch.randn(3, 24), _int(0, 1, 2), torch.randn(9, 8),
            torch.tensor([5, -1, 17]), torch.randn(16), 1e-6, True, torch.empty(3, 4, 8), cache,
        ),
        "latent_attention": (
            torch.randn(3, 4, 24), cache, torch.zeros(3, 2, dtype=torch.int32), _int(1, 0, -1),
            _int(0, 1, 3, 3), _int(9, 2, 0), 0.3, 3, None, None, torch.empty(3, 4, 16),
        ),
        "batched_linear": (
            torch.randn(3, 4, 24), torch.randn(4, 5, 24), torch.empty(3, 4, 5),
        ),
    }  # fmt: skip


def _experts_args() -> dict[str, tuple[Any, ...]]:
    return {
        "route": (
            torch.randn(4, 24), torch.randn(9, 24), torch.rand(8), torch.tensor([5, -1, 0, 9]),
            True, True, 2.5, 4, 2, torch.empty(4, 9), torch.empty(4, 4), _int(*[7] * 12).view(4, 3),
            _int(*[7] * 12), _int(*[7] * 9),
        ),
        "grouped_linear": (
            torch.randn(4, 24), torch.randn(3, 5, 24), _int(0, 1, 1, 4), 4,
            torch.empty(4, 5),
        ),
        "grouped_linear_silu_mul": (
            torch.randn(2, 24), torch.randn(3, 10, 24), _int(1, 0, 2, 3), _int(0, 1, 2, 4),
            torch.empty(4, 24), torch.empty(4, 5),
        ),
        "combine_experts": (
            torch.randn(4, 12), _int(1, 0, -1, -1).view(2, 2), torch.rand(2, 3),
            torch.randn(2, 12), True, torch.randn(2, 12),
        ),
    }  # fmt: skip


def _args_of_quantised() -> dict[str, tuple[Any, ...]]:
    packed = _packed(10, 64)
    return {
        "linear_w4a16": (
            torch.randn(3, 64), packed, torch.randn(10), torch.randn(3, 10), 1, None, 0.0,
            torch.randn(10), torch.empty(3, 10), torch.empty(3, 1),
        ),
        "dequantise_w4a16": (packed, torch.empty(10, 64)),
        "grouped_linear_w4a16": (
            torch.randn(2, 64) / 16, torch.stack((packed, packed)), _int(1, 0, 3, 2),
            _int(0, 2, 4), 2, torch.zeros(4, 64), torch.empty(4, 5),
        ),
        "linear_fp8": (
            torch.randn(3, 70), *_fp8(10, 70), torch.randn(10), torch.randn(3, 10), 1, None, 0.0,
            torch.randn(10), torch.empty(3, 10), torch.empty(3, 1),
        ),
        "dequantise_fp8": (*_fp8(10, 70), torch.empty(10, 70)),
        "grouped_linear_fp8": (
            torch.randn(4, 70), *_fp8(2, 10, 70), None, _int(0, 1, 4), 4, torch.empty(4, 10),
        ),
    }  # fmt: skip


def _args_of_adapters() -> dict[str, tuple[Any, ...]]:
    rows = _int(1, 2, 4), _int(5, 0, 3, 1, 5, 2).view(2, 3)
    return {
        "lora_shrink": (
            torch.randn(4, 24), torch.randn(2, 3, 5, 24), *rows, torch.randn(2, 3),
            torch.ones(2, 4, 3, 5), torch.rand(4, 2), 1e-5,
        ),
        "lora_expand": (
            torch.randn(2, 4, 3, 5), torch.randn(2, 10, 5), *rows, _int(0, 4, 6, 10),
            torch.randn(4, 10),
        ),
        "lora_expand_silu_mul": (
            torch.randn(2, 4, 2, 5), torch.randn(2, 10, 5), rows[0], rows[1][:, :2],
            _int(0, 5, 10), torch.randn(4, 10), torch.empty(4, 5),
        ),
    }  # fmt: skip


def _fp8(*shape: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    weight = torch.randint(0, 56, shape, dtype=torch.uint8)  # below 1
    return weight, torch.rand(*shape[:-2], -(-shape[-2] // 8), -(-shape[-1] // 64)), 8, 64


def _packed(n: int, k: int) -> torch.Tensor:
    packed = torch.zeros(w4a16.packed_shape(n, k, 32), dtype=torch.int32)
    w4a16.fill_with_noise(packed, n, k, 1.0, torch.Generator().manual_seed(0))
    return packed


# CUDA has all; serves_linear is not an op on tensors: tests/ops/test_linear.py has it.
CUDA_OP_NAMES = {
    "plan_attention", "rope_attention", "serves_linear", "serves_linear_w4a16",
    "serves_linear_fp8", "try_linear_w4a16",
    # Of 8-bit matrix units: tests/gpu/test_linear_w8a8.py.
    "linear_w8a8", "serves_linear_w8a8", "try_linear_w8a8",
    # tests/gpu/test_linear_lora.py.
    "linear_lora", "serves_linear_lora",
    # Between ranks: tests/ops/test_peers.py.
    "all_reduce_add_norm", "all_reduce_one_shot", "all_reduce_two_shot", "gather_rows",
    "broadcast_tokens",
}  # fmt: skip
CPU_OP_NAMES = [name for name in fakes.OP_NAMES if name not in CUDA_OP_NAMES]


@pytest.mark.parametrize("name", CPU_OP_NAMES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.pyserve, name).default, op_args()[name])


@pytest.mark.parametrize("name", CPU_OP_NAMES)
def test_the_twin_has_the_same_signature_and_effect(name: str) -> None:
    op = getattr(torch.ops.pyserve, name).default
    native, twin = op_args()[name], op_args()[name]
    for mine, theirs in zip(native, twin, strict=True):
        if isinstance(mine, torch.Tensor):
            theirs.copy_(mine)
    assert op(*native) is None
    assert getattr(reference, name)(*twin) is None
    for argument, mine, theirs in zip(op._schema.arguments, native, twin, strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs, msg=argument.name)


def test_every_op_has_a_fake_and_a_twin() -> None:
    defined = {
        schema.name.removeprefix("pyserve::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("pyserve::")
    }
    assert defined == set(fakes.OP_NAMES)


@pytest.mark.parametrize("name", CPU_OP_NAMES)
def test_fakes_touch_no_memory(name: str) -> None:
    args = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in op_args()[name]]
    assert getattr(torch.ops.pyserve, name)(*args) is None


def test_out_of_every_op_is_written_in_full() -> None:
    """Twice from different garbage: what an op leaves does not depend on what was there."""
    last = (
        "silu_mul", "gelu_tanh_mul", "sample", "logprobs", "dequantise_w4a16", "dequantise_fp8",
        "grouped_linear", "grouped_linear_silu_mul", "grouped_linear_w4a16", "grouped_linear_fp8",
        "route", "latent_attention", "batched_linear",
    )  # fmt: skip
    places = dict.fromkeys(last, -1) | {
        "rms_norm": 3, "linear": 3, "linear_silu_mul": 3, "paged_attention": 12
    }  # fmt: skip
    for name, place in places.items():
        args = op_args()[name]
        out = args[place]
        results = []
        for garbage in (3, 99):
            out.fill_(garbage)
            getattr(torch.ops.pyserve, name)(*args)
            results.append(out.clone())
        assert torch.equal(*results)


def test_narrow_gives_views_of_the_first_rows() -> None:
    plan = ops.StepPlan.allocate(8, 4, torch.device("cpu"))
    part = plan.narrow(3, 2)
    shapes = [tuple(getattr(part, name).shape) for name in ops.StepPlan._fields]
    assert shapes == [(3,), (3,), (3,), (2,), (3,), (2,), (2, 2)]
    part.sample_rows[1, 1] = 5
    assert plan.sample_rows[1, 1] == 5
