"""logprobs on CUDA: ids and ranks are those of the twin, logarithms follow the ratio rule."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.limits import TOP_LOGPROBS
from pyserve.ops import LogprobRows
from tests.ops.oracle import assert_ratio
from tests.ops.test_logprobs import INF, NAN, by_twin, poisoned

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)


def on_card(logits: Tensor, rows: Tensor, token_ids: Tensor) -> LogprobRows:
    out = LogprobRows.of(poisoned(len(rows)).words.cuda())
    ops.logprobs(logits, rows.cuda(), token_ids.cuda(), out)
    return LogprobRows.of(out.words.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_twin(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for i in range(150):
        vocab_size = rng.choice([1, 5, 20, 257, 1000, 5121, 9001]) if i else 150_001
        num_rows, offset = rng.choice([1, 2, 5]), rng.choice([0, 0, 1, 3])
        logits = torch.randn(num_rows, vocab_size) * rng.choice([0.0, 0.1, 1.0, 5.0, 30.0])
        if rng.random() < 0.4:
            logits = logits.round()  # many ties
        if rng.random() < 0.2:
            logits[:, rng.randrange(vocab_size) + 1 :] = -INF
        logits = logits.to(dtype)
        wide = torch.zeros(num_rows, vocab_size + offset, dtype=dtype, device="cuda")
        wide[:, offset:] = logits.cuda()
        tokens = torch.randint(vocab_size, (num_rows,), dtype=torch.int32)
        rows = torch.randperm(num_rows).int()
        if rng.random() < 0.3:
            rows[0] = -1
        got, twin = on_card(wide[:, offset:], rows, tokens), poisoned(num_rows)
        by_twin(logits, rows, tokens, twin)
        assert torch.equal(got.token_ranks, twin.token_ranks)
        assert torch.equal(got.top_ids, twin.top_ids)
        mine = torch.cat((got.token_logprobs[:, None], got.top_logprobs), 1)
        plain = torch.cat((twin.token_logprobs[:, None], twin.top_logprobs), 1)
        exact = logits.double().log_softmax(-1)[rows.clamp_min(0).long()]
        ids = torch.cat((tokens[rows.clamp_min(0).long()][:, None], got.top_ids), 1).long()
        exact = torch.where(plain == -INF, -INF, exact.gather(1, ids.clamp_min(0)))
        assert_ratio(mine, plain, exact, plain_float32_error=3e-6)


@pytest.mark.parametrize("vocab_size", [30, 10_000])
def test_a_row_that_is_not_a_number_stays_sane(vocab_size: int) -> None:
    logits = torch.zeros(4, vocab_size).bfloat16()
    logits[0, 3] = NAN
    logits[1, :] = NAN
    logits[2, 7] = INF
    logits[3, :] = -INF
    rows, tokens = torch.arange(4).int(), torch.tensor([3, 3, 7, -1], dtype=torch.int32)
    got, twin = on_card(logits.cuda(), rows, tokens), poisoned(4)
    by_twin(logits, rows, tokens, twin)
    assert torch.equal(got.top_ids, twin.top_ids)
    assert torch.equal(got.token_ranks, twin.token_ranks)
    assert torch.equal(got.words[1:], twin.words[1:])
    assert got.top_logprobs[0].tolist() == pytest.approx(twin.top_logprobs[0].tolist())
    assert got.top_ids.shape[1] == TOP_LOGPROBS
