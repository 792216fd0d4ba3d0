"""logprobs: ids and token_ranks are those of the twin, logarithms follow the ratio rule."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.limits import TOP_LOGPROBS
from pyserve.ops import LOGPROB_WORDS, LogprobRows, reference
from tests.ops.oracle import assert_ratio

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16)


def poisoned(num_asked: int, garbage: int = 77) -> LogprobRows:
    return LogprobRows.of(torch.full((num_asked, LOGPROB_WORDS), garbage, dtype=torch.int32))


def by_twin(
    logits: Tensor, rows: Tensor, token_ids: Tensor, out: LogprobRows, *, is_normalized: bool = True
) -> None:
    reference.logprobs(logits, rows, token_ids, is_normalized, *out[1:])


FUNCTIONS = (ops.logprobs, by_twin)


def tell(
    function: Callable[..., None],
    logits: Tensor,
    token_ids: list[int],
    *,
    is_normalized: bool = True,
) -> LogprobRows:
    """Of all rows."""
    out = poisoned(len(logits))
    rows = torch.arange(len(logits), dtype=torch.int32)
    tokens = torch.tensor(token_ids, dtype=torch.int32)
    function(logits, rows, tokens, out, is_normalized=is_normalized)
    return out


def random_logits(rng: random.Random, shape: tuple[int, int]) -> Tensor:
    logits = torch.randn(shape) * rng.choice([0.0, 0.1, 1.0, 5.0, 30.0])
    if rng.random() < 0.3:
        logits = logits.round()  # many ties
    if rng.random() < 0.2:
        logits = logits.sort(-1, descending=rng.random() < 0.5).values
    if rng.random() < 0.2:
        logits[:, rng.randrange(shape[1]) :] = -INF
    return logits.to(rng.choice(DTYPES))


def test_against_float64() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for i in range(300):
        vocab_size = rng.choice([1, 5, 19, 20, 21, 64, 257, 1000, 5121, 9001]) if i else 150_001
        num_rows = rng.choice([1, 2, 5])
        logits = random_logits(rng, (num_rows, vocab_size))
        before = logits.clone()
        tokens = [rng.randrange(vocab_size) for _ in range(num_rows)]
        got, twin = (tell(function, logits, tokens) for function in FUNCTIONS)
        assert torch.equal(got.token_ranks, twin.token_ranks) and torch.equal(
            got.top_ids, twin.top_ids
        )
        assert torch.equal(logits, before)
        if bool((logits.float().max(-1).values == -INF).any()):
            assert torch.equal(got.words, twin.words)
            continue
        exact = logits.double().log_softmax(-1)
        num_top = min(vocab_size, TOP_LOGPROBS)
        order = torch.sort(logits.float(), descending=True, stable=True).indices[:, :num_top]
        assert torch.equal(got.top_ids[:, :num_top], order.int())
        assert (got.top_ids[:, num_top:] == -1).all()
        assert (got.top_logprobs[:, num_top:] == -INF).all()
        index = torch.tensor(tokens)[:, None]
        assert torch.equal(
            got.token_ranks[:, None],
            1 + (logits > logits.gather(1, index)).sum(-1, keepdim=True).int(),
        )
        plain = logits.float().log_softmax(-1)
        ids = torch.cat((order, index), 1)
        mine = torch.cat((got.top_logprobs[:, :num_top], got.token_logprobs[:, None]), 1)
        assert_ratio(mine, plain.gather(1, ids), exact.gather(1, ids), plain_float32_error=3e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_equal_logits_come_by_id(function: Callable[..., None]) -> None:
    logits = torch.zeros(1, 10_000)
    logits[0, [70, 9_000, 300]] = 1.0
    out = tell(function, logits, [9_000])
    assert out.top_ids[0].tolist() == [70, 300, 9_000, *range(TOP_LOGPROBS - 3)]
    assert out.token_ranks.tolist() == [1]
    assert tell(function, logits, [5]).token_ranks.tolist() == [4]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_row_that_is_not_a_number_stays_sane(function: Callable[..., None]) -> None:
    for vocab_size in (30, 10_000):
        logits = torch.zeros(4, vocab_size)
        logits[0, 3] = NAN
        logits[1, :] = NAN
        logits[2, 7] = INF
        logits[3, :] = -INF
        out = tell(function, logits, [3, 3, 7, -1])
        assert not out.top_logprobs.isnan().any() and not out.token_logprobs.isnan().any()
        assert out.token_logprobs.tolist() == [-INF] * 4
        assert out.token_ranks.tolist() == [vocab_size, 1, 1, 0]
        first = list(range(TOP_LOGPROBS))
        assert out.top_ids[0].tolist() == [0, 1, 2, *range(4, TOP_LOGPROBS + 1)]
        assert out.top_ids[1].tolist() == out.top_ids[3].tolist() == first
        assert out.top_ids[2].tolist() == [7, *(i for i in first if i != 7)]
        assert (out.top_logprobs[1:] == -INF).all()
        assert out.top_logprobs[0].tolist() == pytest.approx(
            [-float(torch.tensor(vocab_size - 1.0).log())] * TOP_LOGPROBS, abs=1e-5
        )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_normalize_they_are_the_logits(function: Callable[..., None]) -> None:
    logits = torch.randn(3, 500)
    logits[2, 1] = INF
    out = tell(function, logits, [5, 6, -1], is_normalized=False)
    expected = logits.sort(-1, descending=True).values[:, :TOP_LOGPROBS]
    assert torch.equal(out.top_logprobs, expected)
    assert out.token_logprobs.tolist() == [float(logits[0, 5]), float(logits[1, 6]), -INF]


def test_rows_that_do_not_ask_threads_and_strides_change_nothing() -> None:
    torch.manual_seed(1)
    wide = torch.randn(50, 20_100)
    logits = wide[:, 50:20_050]
    tokens = torch.randint(20_000, (50, 2), dtype=torch.int32)
    rows = torch.randperm(50)[:40].int().repeat(2, 1).T.contiguous()
    rows[7] = -1
    alone = tell(ops.logprobs, logits.contiguous(), tokens[:, 1].tolist())
    before = torch.get_num_threads()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        out = poisoned(40)
        ops.logprobs(logits, rows[:, 1], tokens[:, 1], out)
        expected = alone.words[rows[:, 0].long()]
        expected[7] = 0
        nothing = LogprobRows.of(expected[7:8])
        nothing.token_logprobs.fill_(-INF)
        nothing.top_logprobs.fill_(-INF)
        nothing.top_ids.fill_(-1)
        assert torch.equal(out.words, expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_refusals(function: Callable[..., None]) -> None:
    logits, one = torch.zeros(2, 40), torch.zeros(1, dtype=torch.int32)
    for row in (2, -2, 2**31 - 1):
        with pytest.raises(RuntimeError, match=f"row {row} of 2"):
            function(logits, one + row, torch.zeros(2, dtype=torch.int32), poisoned(1))
    for token in (40, -2):
        with pytest.raises(RuntimeError, match=f"token id {token}, the vocabulary 40"):
            function(logits, one, torch.tensor([token, 0], dtype=torch.int32), poisoned(1))
    # A row that does not ask may hold any token.
    function(logits, one + 1, torch.tensor([99, 0], dtype=torch.int32), poisoned(1))


def test_shapes_are_checked() -> None:
    logits, one = torch.zeros(2, 40), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="size 0 of token_ids is 1, expected 2"):
        ops.logprobs(logits, one, one, poisoned(1))
    with pytest.raises(RuntimeError, match="size 0 of token_logprobs is 2, expected 1"):
        ops.logprobs(logits, one, torch.zeros(2, dtype=torch.int32), poisoned(2))
    with pytest.raises(RuntimeError, match="float32 or bfloat16, got Half"):
        ops.logprobs(logits.half(), one, torch.zeros(2, dtype=torch.int32), poisoned(1))
