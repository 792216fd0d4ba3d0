"""Every op on tensors that end where the memory ends: what reads or writes behind them crashes.

A program of its own, for test_bounds.py; it prints each op's name before it runs it.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import build, fp8, w4a16
from tests.ops import test_attention, test_rope
from tests.ops.step_inputs import SlotUpdate
from tests.ops.test_sample import tables_of

SHAPES = [(1, 1), (3, 7), (16, 32), (33, 50), (77, 256), (99, 259)]
DTYPES = (torch.float32, torch.bfloat16)
_maps: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy of `tensor`, the page behind it being nobody's."""
    page = mmap.PAGESIZE
    num_bytes = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, num_bytes + page)
    _maps.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + num_bytes), page, 0) == 0
    if not tensor.nbytes:
        return tensor
    copy = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=num_bytes - tensor.nbytes
    ).view(tensor.shape)
    return copy.copy_(tensor)


def linear() -> None:
    for dtype in DTYPES:
        for n, k in SHAPES:
            weight, bias = guarded(torch.randn(n, k).to(dtype)), guarded(torch.randn(n).to(dtype))
            for num_rows in (1, 2, 3, 5, 17):
                x = guarded(torch.randn(num_rows, k).to(dtype))
                out = guarded(torch.zeros(num_rows, n, dtype=dtype))
                torch.ops.pyserve.linear(x, weight, bias, out)
                expected = x.double() @ weight.double().T + bias.double()
                torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.2)
                torch.ops.pyserve.linear_add(x, weight, bias, out)
                torch.testing.assert_close(out.double(), 2 * expected, rtol=0.02, atol=0.4)
                if n % 2 == 0:
                    half = guarded(torch.zeros(num_rows, n // 2, dtype=dtype))
                    torch.ops.pyserve.linear_silu_mul(x, weight, bias, half)
                    gate, up = expected.chunk(2, 1)
                    expected = torch.nn.functional.silu(gate) * up
                    torch.testing.assert_close(half.double(), expected, rtol=0.04, atol=0.4)


def linear_w4a16() -> None:
    for n, k, size in [(16, 128, 128), (3, 64, 64), (33, 96, 32), (24, 256, 128), (99, 32, 32)]:
        packed = torch.zeros(w4a16.packed_shape(n, k, size), dtype=torch.int32)
        w4a16.fill_with_noise(packed, n, k, 1.0, None)
        packed, weight = guarded(packed), w4a16.dequantised(packed, n, k)
        for dtype in DTYPES:
            plain = guarded(torch.zeros(n, k, dtype=dtype))
            torch.ops.pyserve.dequantise_w4a16(packed, plain)
            assert torch.equal(plain, weight.to(dtype))
            for num_rows in (1, 2, 3, 5):
                x, bias = (guarded(torch.randn(s).to(dtype)) for s in ((num_rows, k), (n,)))
                out = guarded(torch.zeros(num_rows, n, dtype=dtype))
                torch.ops.pyserve.linear_w4a16(x, packed, bias, out)
                expected = x.double() @ weight.double().T + bias.double()
                torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.2)


def linear_fp8() -> None:
    sizes = [(16, 128, 128, 128), (3, 64, 1, 64), (33, 100, 1, 100), (99, 200, 8, 64)]
    for n, k, rows, columns in sizes:
        scales = guarded(torch.rand(-(-n // rows), -(-k // columns)))
        bytes_ = guarded(torch.randint(0, 127, (n, k), dtype=torch.uint8))
        matrix = bytes_, scales, rows, columns
        weight = fp8.dequantised(*matrix)
        for dtype in DTYPES:
            plain = guarded(torch.zeros(n, k, dtype=dtype))
            torch.ops.pyserve.dequantise_fp8(*matrix, plain)
            assert torch.equal(plain, weight.to(dtype))
            for num_rows in (1, 2, 3, 5):
                x, bias = (guarded(torch.randn(s).to(dtype)) for s in ((num_rows, k), (n,)))
                out = guarded(torch.zeros(num_rows, n, dtype=dtype))
                torch.ops.pyserve.linear_fp8(x, *matrix, bias, out)
                expected = (x.double() @ weight.double().T + bias.double()).to(dtype)
                torch.testing.assert_close(out, expected, rtol=0.02, atol=2.0)


def quantised_experts() -> None:
    """Rows of the first expert and of the last."""
    n, k = 32, 128
    packed = torch.zeros(3, *w4a16.packed_shape(n, k, 64), dtype=torch.int32)
    for one in packed:
        w4a16.fill_with_noise(one, n, k, 1.0, None)
    weight = guarded(torch.randint(0, 127, (3, n, k), dtype=torch.uint8))
    integers, floats = (guarded(packed),), (weight, guarded(torch.rand(3, n, 1)), 1, k)
    offsets, order = (guarded(torch.tensor(it).int()) for it in ([0, 1, 2, 4], [1, 0, 2, 3]))
    for dtype in DTYPES:
        x = guarded(torch.randn(4, k).to(dtype))
        for matrix, kind in ((integers, "w4a16"), (floats, "fp8")):
            op = getattr(torch.ops.pyserve, f"grouped_linear_{kind}")
            # On a CPU nothing is sorted.
            whole, half = (guarded(torch.zeros(4, size, dtype=dtype)) for size in (n, n // 2))
            more = (None,) if kind == "w4a16" else ()
            op(x, *matrix, None, offsets, 4, *more, whole)
            op(guarded(x[:2].clone()), *matrix, order, offsets, 4, *more, half)


def experts() -> None:
    """One token of each expert's, and rows of the last expert."""
    rule = (False, True, 1.0, 1, 1)
    slots = guarded(torch.tensor([3, -1, 0]))
    for dtype in DTYPES:
        for n, k in SHAPES:
            x, router = (guarded(torch.randn(size, k).to(dtype)) for size in (3, 6))
            gate_up, down = torch.randn(5, 2 * n, k), torch.randn(5, k, n)
            gate_up, down = guarded(gate_up.to(dtype)), guarded(down.to(dtype))
            logits, weights = guarded(torch.zeros(3, 6)), guarded(torch.zeros(3, 3))
            places, order, offsets = (
                guarded(torch.zeros(size, dtype=torch.int32)) for size in ((3, 2), (6,), (6,))
            )
            torch.ops.pyserve.route(
                x, router, None, slots, *rule, logits, weights, places, order, offsets
            )
            assert int(offsets[-1]) == 4
            activated, rows = (guarded(torch.zeros(6, size, dtype=dtype)) for size in (n, k))
            torch.ops.pyserve.grouped_linear_silu_mul(
                x, gate_up, order, offsets, guarded(torch.zeros_like(rows)), activated
            )
            torch.ops.pyserve.grouped_linear(activated, down, offsets, 3, rows)
            out = guarded(torch.zeros(3, k, dtype=dtype))
            shared = guarded(torch.zeros(3, k, dtype=dtype))
            torch.ops.pyserve.combine_experts(rows, places, weights, shared, True, out)
            assert not bool(out[1].any()) and bool(out.isfinite().all())


def latents() -> None:
    """The last block of the cache is the last row's, and full."""
    table = guarded(torch.tensor([[2], [1], [3]], dtype=torch.int32))
    rows, starts, lens = (
        guarded(torch.tensor(values, dtype=torch.int32))
        for values in ((0, -1, 2), (0, 1, 1, 4), (5, 0, 16))
    )
    positions = guarded(torch.tensor([4, 13, 14, 15], dtype=torch.int32))
    slots = guarded(torch.tensor([36, 61, 62, 63]))
    for dtype in DTYPES:
        for size, rope_dim in ((8, 8), (40, 8), (72, 16), (512, 64)):
            width = size + rope_dim
            cache = guarded(torch.randn(4, 16, width).to(dtype))
            q, compressed = (
                guarded(torch.randn(4, *shape).to(dtype)) for shape in ((3, rope_dim), (width,))
            )
            absorbed = guarded(torch.randn(4, 3, width).to(dtype))
            torch.ops.pyserve.rope_write_latent(
                q, compressed, positions, guarded(torch.randn(16, rope_dim)), slots,
                guarded(torch.randn(size).to(dtype)), 1e-6, True, absorbed[..., size:], cache,
            )  # fmt: skip
            out = guarded(torch.zeros(4, 3, size, dtype=dtype))
            torch.ops.pyserve.latent_attention(
                absorbed, cache, table, rows, starts, lens, 0.1, 3, None, None, out
            )
            assert bool(out.isfinite().all())
            weight = guarded(torch.randn(3, 5, size).to(dtype))
            heads = guarded(torch.zeros(4, 3, 5, dtype=dtype))
            torch.ops.pyserve.batched_linear(out, weight, heads)
            assert bool(heads.isfinite().all())


def rms_norm() -> None:
    for dtype in DTYPES:
        for num_rows, hidden in SHAPES:
            x, weight = torch.randn(num_rows, hidden).to(dtype), torch.randn(hidden).to(dtype)
            out, residual = guarded(torch.zeros_like(x)), guarded(x)
            torch.ops.pyserve.rms_norm(guarded(x), guarded(weight), 1e-6, out)
            for x_weight in (None, guarded(weight)):
                torch.ops.pyserve.add_rms_norm(
                    guarded(x), residual, guarded(weight), 1e-6, out, 0.0, x_weight
                )


def silu_mul() -> None:
    for dtype in DTYPES:
        for num_tokens, width in SHAPES:
            out = guarded(torch.zeros(num_tokens, width, dtype=dtype))
            torch.ops.pyserve.silu_mul(guarded(torch.randn(num_tokens, 2 * width).to(dtype)), out)


def rope_write_kv() -> None:
    for dtype in DTYPES:
        for head_dim, rotary_dim in ((8, 8), (24, 20), (80, 62), (128, 128)):
            case = test_rope.Case.make(
                head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype, norm=True
            )
            assert case.q_norm is not None and case.k_norm is not None
            for name in ("qkv", "positions", "cos_sin", "slot_mapping", "key_cache",
                         "value_cache", "q_norm", "k_norm"):  # fmt: skip
                setattr(case, name, guarded(getattr(case, name)))
            case.positions[-1] = test_rope.MAX_POSITION - 1
            case.slot_mapping[-1] = case.key_cache.shape[0] * case.key_cache.shape[1] - 1
            case.run()


def paged_attention() -> None:
    for dtype in DTYPES:
        for head_dim in (8, 24, 64, 128):
            for rows in ([(1, 33)], [(1, 16), (5, 70)], [(40, 40)]):
                case = test_attention.Case.make(rows, head_dim=head_dim, dtype=dtype)
                # The last block of the cache is used, whole.
                num_blocks = case.key_cache.shape[0]
                case.block_table[case.row_slots[0].long(), 0] = num_blocks - 1
                for name in ("q", "key_cache", "value_cache", "block_table", "row_slots",
                             "cu_seqlens_q", "seq_lens"):  # fmt: skip
                    setattr(case, name, guarded(getattr(case, name)))
                case.run()


def sample() -> None:
    for vocab_size in (1, 5, 17, 64, 100, 1003):
        for options in ({}, {"top_k": 3}, {"top_p": 0.7}, {"has_penalties": 1, "top_k": 2}):
            row = SlotUpdate(slot=0, temperature=1.0, presence_penalty=0.5, **options)
            tables = tables_of([row], vocab_size)
            for dtype in DTYPES:
                sampled = ops.sample(
                    guarded(torch.randn(1, vocab_size).to(dtype)),
                    guarded(torch.zeros(1, dtype=torch.int32)),
                    guarded(tables.slots),
                    guarded(tables.token_counts),
                )
                assert 0 <= int(sampled) < vocab_size


def apply_bitmask() -> None:
    for vocab_size in (1, 5, 17, 64, 100, 1003):
        mask = torch.randint(-(2**31), 2**31, (2, -(-vocab_size // 32)), dtype=torch.int32)
        mask[1] = 0
        for dtype in DTYPES:
            logits = guarded(torch.randn(2, vocab_size).to(dtype))
            ops.apply_bitmask(logits, guarded(mask), guarded(torch.tensor([0, 1]).int()))
            assert (logits[1] == -torch.inf).all()


def logprobs() -> None:
    for vocab_size in (1, 5, 17, 64, 100, 1003):
        for dtype in DTYPES:
            out = ops.LogprobRows.of(guarded(torch.ones(2, ops.LOGPROB_WORDS, dtype=torch.int32)))
            logits = guarded(torch.randn(2, vocab_size).to(dtype))
            both = guarded(torch.tensor([0, 1]).int())
            ops.logprobs(logits, both, guarded(torch.tensor([0, vocab_size - 1]).int()), out)
            assert ((out.token_ranks >= 1) & (out.token_ranks <= vocab_size)).all()


if __name__ == "__main__":
    build.load_native(is_reference_allowed=False, progress=lambda line: None)
    torch.manual_seed(0)
    for run in (linear, linear_w4a16, linear_fp8, quantised_experts, experts, rms_norm, silu_mul,
                rope_write_kv, paged_attention, latents, sample, apply_bitmask,
                logprobs):  # fmt: skip
        print(run.__name__, flush=True)
        run()
    print("whole")
