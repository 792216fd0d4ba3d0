"""apply_bitmask: bit for bit the twin, and the twin against what a bit means."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16)
VOCAB_SIZES = (1, 5, 31, 32, 33, 64, 100, 1000, 1003, 4096)


def bits(logits: Tensor) -> Tensor:
    """A NaN is equal to itself here."""
    return logits.view(torch.int16)


def pack(is_allowed: Tensor) -> Tensor:
    """bool [num_masked, vocab_size] -> int32 [num_masked, ceil(vocab_size / 32)]."""
    num_masked, vocab_size = is_allowed.shape
    padded = np.zeros((num_masked, -(-vocab_size // 32) * 32), dtype=bool)
    padded[:, :vocab_size] = is_allowed.numpy()
    words = np.packbits(padded, axis=1, bitorder="little").view("<i4")
    return torch.tensor(words)


def some_mask(rng: random.Random, shape: tuple[int, int]) -> Tensor:
    """Mostly nothing, mostly everything, or anything; with runs of 32 of a kind."""
    share = rng.choice([0.0, 0.01, 0.5, 0.99, 1.0])
    mask = torch.rand(shape) < share
    if rng.random() < 0.5:
        begin = rng.randrange(shape[1])
        mask[:, begin : begin + 300] = rng.random() < 0.5
    return mask


def test_bit_for_bit_what_the_mask_says() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for i in range(300):
        vocab_size = rng.choice(VOCAB_SIZES) if i else 150_001
        num_rows = rng.choice([1, 2, 5])
        num_masked = rng.randrange(num_rows + 1)
        logits = torch.randn(num_rows, vocab_size).to(rng.choice(DTYPES))
        logits[rng.randrange(num_rows), rng.randrange(vocab_size)] = rng.choice([NAN, INF, -INF])
        rows = torch.tensor(rng.sample(range(num_rows), num_masked), dtype=torch.int32)
        is_allowed = some_mask(rng, (num_masked, vocab_size))
        expected, twin = logits.clone(), logits.clone()
        for row, allowed in zip(rows.tolist(), is_allowed, strict=True):
            expected[row][~allowed] = -INF
        ops.apply_bitmask(logits, pack(is_allowed), rows)
        reference.apply_bitmask(twin, pack(is_allowed), rows)
        assert torch.equal(bits(logits), bits(expected))
        assert torch.equal(bits(twin), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_a_short_mask_is_forbidden(dtype: torch.dtype) -> None:
    for num_words in (0, 1, 3):
        for function in (ops.apply_bitmask, reference.apply_bitmask):
            logits = torch.zeros(1, 101, dtype=dtype)
            mask = torch.full((1, num_words), -1, dtype=torch.int32)
            function(logits, mask, torch.zeros(1, dtype=torch.int32))
            assert (logits[0, : 32 * num_words] == 0).all()
            assert (logits[0, 32 * num_words :] == -INF).all()


def test_threads_strides_and_padding_change_nothing() -> None:
    torch.manual_seed(0)
    is_allowed = torch.rand(20, 30_001) < 0.3
    wide = torch.randn(24, 30_011)
    expected = wide.clone()
    rows = torch.randperm(24)[:20].int()
    rows[7] = -1
    for row, allowed in zip(rows.tolist(), is_allowed, strict=True):
        if row >= 0:
            expected[row, 5:30_006][~allowed] = -INF
    before = torch.get_num_threads()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        logits = wide.clone()
        masks = torch.zeros(20, 1000, dtype=torch.int32)
        masks[:, 10:948] = pack(is_allowed)
        pairs = torch.stack((rows, rows), 1)
        ops.apply_bitmask(logits[:, 5:30_006], masks[:, 10:948], pairs[:, 1])
        assert torch.equal(logits, expected)
    torch.set_num_threads(before)


def test_refusals() -> None:
    logits, zero = torch.zeros(2, 40), torch.zeros(1, dtype=torch.int32)
    mask = torch.zeros(1, 2, dtype=torch.int32)
    for function in (ops.apply_bitmask, reference.apply_bitmask):
        for row in (2, -2, 2**31 - 1):
            with pytest.raises(RuntimeError, match=f"row {row} of 2"):
                function(logits, mask, zero + row)
    with pytest.raises(RuntimeError, match="a mask of 3 words for a vocabulary of 40, at most 2"):
        ops.apply_bitmask(logits, torch.zeros(1, 3, dtype=torch.int32), zero)
    with pytest.raises(RuntimeError, match="size 0 of bitmask is 1, expected 2"):
        ops.apply_bitmask(logits, mask, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="bitmask must be Int, got Long"):
        ops.apply_bitmask(logits, mask.long(), zero)
    with pytest.raises(RuntimeError, match="float32 or bfloat16, got Half"):
        ops.apply_bitmask(logits.half(), mask, zero)
    assert (logits == 0).all()
