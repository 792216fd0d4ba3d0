"""lora_shrink and lora_expand: the ratio rule on odd shapes and ranks; what is outside of the
segments, or behind a rank, is neither read nor written; a row's result depends on the row alone."""

from __future__ import annotations

import pytest
import torch

from tests.ops import oracle
from tests.ops.lora_cases import NAN, exactly, make_case, run, run_twin, starts_of

RANKS: list[list[list[int]]] = [
    [[1]], [[8], [16]], [[7, 0, 33]], [[16, 16, 16], [64, 3, 0], [0, 0, 0], [5, 64, 17]],
    [[256], [0], [1]],
]  # fmt: skip
LENGTHS: dict[int, list[tuple[int, ...]]] = {
    1: [(0, 1), (3, 2), (0, 37)],
    2: [(0, 1, 1), (2, 0, 5), (1, 18, 19)],
    3: [(1, 1, 1, 1), (0, 4, 0, 3)],
    4: [(1, 2, 3, 4, 5), (0, 0, 0, 0, 1), (5, 17, 1, 0, 16)],
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("k", [24, 129])
def test_sums(ranks: list[list[int]], k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    sizes = [37, 5, 64][: len(ranks[0])]
    case = make_case(ranks, sizes, k, max(max(own) for own in ranks) + 2, dtype)
    for lengths in LENGTHS[len(ranks)]:
        starts = starts_of(*lengths)
        num_tokens = sum(lengths) + 2  # padding
        x = torch.randn(num_tokens, k).to(dtype)
        wide = torch.randn(num_tokens, sum(sizes) + 3).to(dtype)
        before, out = wide.clone(), wide[:, : sum(sizes)]
        plain = out.clone()
        run_twin(case, x, starts, plain)
        exact = exactly(case, x, starts, out)
        run(case, x, starts, out)
        oracle.assert_ratio(out, plain, exact, plain_float32_error=1e-5)
        assert torch.equal(wide[:, sum(sizes) :], before[:, sum(sizes) :])
        assert torch.equal(wide[: lengths[0]], before[: lengths[0]])
        assert torch.equal(wide[sum(lengths) :], before[sum(lengths) :])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_row_does_not_depend_on_its_batch_mates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = make_case([[16, 8], [40, 3]], [50, 30], 96, 40, dtype)
    x, y = torch.randn(41, 96).to(dtype), torch.randn(41, 80).to(dtype)
    together = y.clone()
    run(case, x, starts_of(3, 20, 18), together)
    for row in range(41):
        alone = y[row : row + 1].clone()
        run(case, x[row : row + 1], starts_of(row < 3, 3 <= row < 23, row >= 23), alone)
        assert torch.equal(alone[0], together[row])


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    case = make_case([[64, 64], [64, 1]], [1100, 300], 1024, 64, torch.float32)
    x, results = torch.randn(70, 1024), torch.zeros(3, 70, 1400)
    num_threads = torch.get_num_threads()
    try:
        for i in range(3):
            torch.set_num_threads(i + 1)
            run(case, x, starts_of(1, 40, 29), results[i])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_row_of_nan_fails_alone() -> None:
    case = make_case([[16], [16]], [40], 64, 16, torch.float32)
    x, out = torch.randn(8, 64), torch.zeros(8, 40)
    x[2, 5] = NAN
    run(case, x, starts_of(1, 4, 3), out)
    assert bool(out[2].isnan().all()) and not bool(out[[0, 1, 3, 4, 5, 6, 7]].isnan().any())


@pytest.mark.parametrize("is_native", [True, False])
def test_refusals(is_native: bool) -> None:
    case = make_case([[4], [4]], [10], 16, 4, torch.float32)
    x, out = torch.randn(3, 16), torch.zeros(3, 10)
    act = run if is_native else run_twin
    for starts in ((-1, 1, 2), (2, 1, 3), (0, 1, 4)):
        with pytest.raises(RuntimeError, match="slot . has tokens"):
            act(case, x, torch.tensor(starts, dtype=torch.int32), out)
    for rank in (-1, 5):
        bad = case._replace(ranks=torch.tensor([[4], [rank]], dtype=torch.int32))
        with pytest.raises(RuntimeError, match=r"ranks\[1, 0\] is"):
            act(bad, x, starts_of(0, 1, 2), out)
    for columns in ([-1, 10], [3, 2], [0, 11]):
        bad = case._replace(columns=torch.tensor(columns, dtype=torch.int32))
        with pytest.raises(RuntimeError, match="part 0 has columns"):
            act(bad, x, starts_of(0, 1, 2), out)
    assert not out.any()
