"""apply_bitmask on CUDA: bit for bit the twin, which runs on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from pyserve import ops
from pyserve.ops import reference
from tests.ops.test_bitmask import VOCAB_SIZES, bits, pack, some_mask

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_for_bit_the_twin(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for i in range(150):
        vocab_size = rng.choice(VOCAB_SIZES) if i else 150_001
        num_rows = rng.choice([1, 2, 5])
        num_masked = rng.randrange(num_rows + 1)
        offset, gap = rng.choice([0, 0, 1, 3]), rng.choice([0, 8, 5])  # not always aligned
        wide = torch.randn(num_rows, vocab_size + offset + gap).to(dtype)
        rows = torch.tensor(rng.sample(range(num_rows), num_masked), dtype=torch.int32)
        if num_masked and rng.random() < 0.3:
            rows[0] = -1
        mask = pack(some_mask(rng, (num_masked, vocab_size)))
        mask = mask[:, : rng.choice([mask.shape[1], mask.shape[1] // 2])].contiguous()
        on_card = wide.cuda()
        ops.apply_bitmask(on_card[:, offset : offset + vocab_size], mask.cuda(), rows.cuda())
        reference.apply_bitmask(wide[:, offset : offset + vocab_size], mask, rows)
        assert torch.equal(bits(on_card.cpu()), bits(wide))
