"""lora_shrink and lora_expand: the ratio rule on odd shapes and ranks; what is outside of the
segments, or behind a rank, is neither read nor written; a row's result depends on the row alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyserve.ops import lora
from tests.ops import emulated, oracle
from tests.ops.lora_cases import (
    NAN,
    exactly,
    make_case,
    run,
    run_twin,
    squares_of,
    starts_of,
)

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
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("sizes", [[37, 37], [74]])
def test_sums_of_a_norm_and_before_an_activation(
    sizes: list[int], has_norm: bool, dtype: torch.dtype
) -> None:
    """In three splits: also of tokens that use no adapter, or one without a pair."""
    torch.manual_seed(len(sizes))
    ranks = [[7, 33], [0, 0], [16, 0]]
    case = make_case([own[: len(sizes)] for own in ranks], sizes, 72, 40, dtype)
    starts = starts_of(3, 18, 2, 4)
    x, gate_up = torch.randn(29, 72).to(dtype), torch.randn(29, 74).to(dtype)
    x_squares = squares_of(x) if has_norm else None
    exact = oracle.silu_mul(exactly(case, x, starts, gate_up, x_squares))
    plain, out = torch.full((29, 37), NAN, dtype=dtype), torch.full((29, 37), NAN, dtype=dtype)
    run_twin(case, x, starts, gate_up.clone(), activated=plain, x_squares=x_squares)
    run(case, x, starts, gate_up, activated=out, x_squares=x_squares, num_splits=3)
    # The twin rounds gate and up before.
    error = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    oracle.assert_ratio(out, plain, exact, plain_float32_error=error)


def test_the_sum_over_splits_is_what_is_expanded() -> None:
    torch.manual_seed(0)
    case = make_case([[5, 16]], [20, 30], 16, 16, torch.float32)
    starts, before = starts_of(1, 4), torch.randn(6, 50)
    shrunk = torch.randint(-8, 8, (4, 6, 2, 16)).float()
    whole, out = before.clone(), before.clone()
    rest = case.b, starts, case.ranks, case.columns
    lora.lora_expand(shrunk.sum(0, keepdim=True), *rest, whole)
    lora.lora_expand(shrunk, *rest, out)
    assert torch.equal(out, whole) and not torch.equal(out, before)


def test_room_for_splits_is_enough_for_fewer_tokens_too() -> None:
    card = torch.device("cuda")
    for most in (1, 511, 512, 513, 4096, 9000):
        for num_tokens in range(1, most + 1, 37):
            assert lora.num_splits(num_tokens, card) * num_tokens <= lora.most_rows(most)


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


def test_the_kernels_of_a_card_give_the_sums_of_float64(tmp_path: Path) -> None:
    """Their sources on a CPU; with the adapters of other slots the same sums are wrong."""
    kernels = (
        "core/gate.cuh",
        "lora/lora.h",
        "lora/segments.cuh",
        "lora/shrink.cuh",
        "lora/shrink_many.cu",
        "lora/shrink.cu",
        "lora/expand.cuh",
        "lora/staging.cuh",
        "lora/expand_many.cu",
        "lora/expand.cu",
    )
    program = emulated.build(tmp_path, "lora", kernels)
    done = emulated.run(program, 2, 0)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    done = emulated.run(program, 1, 1)
    assert done.returncode == 1 and "wrong" in done.stdout, done.stdout + done.stderr
