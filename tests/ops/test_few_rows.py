"""The CUDA kernels for few rows of a linear, their source compiled for a CPU: few_rows.cpp, and
few_rows_w4a16.cpp for 4-bit integers, grouped_few_rows.cpp for the matrices of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops import emulated

PROGRAMS = {  # the kernels' files, and rounds that are enough
    "few_rows": (("linear/few_rows",), 2),
    "few_rows_w4a16": (("linear/few_rows", "linear/few_rows_w4a16"), 1),
    "grouped_few_rows": (("linear/few_rows", "experts/work_list", "experts/grouped_few_rows"), 3),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    kernels, num_rounds = PROGRAMS[request.param]
    return emulated.build(tmp_path_factory.mktemp("few"), request.param, kernels), num_rounds


def test_every_tiling_gives_the_sums_of_float64(program: tuple[Path, int]) -> None:
    done = emulated.run(*program, num_too_early=0)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_kernel_that_reads_too_early_is_found_out(program: tuple[Path, int]) -> None:
    done = emulated.run(*program, num_too_early=1)
    assert done.returncode == 1 and "wrong" in done.stdout, done.stdout + done.stderr
