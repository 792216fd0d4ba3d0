"""CUDA kernels of linears, their source compiled for a CPU: those for few rows, few_rows.cpp, of
4-bit integers few_rows_w4a16.cpp, of 8-bit floats few_rows_fp8.cpp; the first two with adapters
end in _lora; of the matrices of experts the same names behind grouped_; and for more rows by 4-bit
integers on Hopper gemm_w4a16.cpp and grouped_gemm_w4a16.cpp, by 8-bit floats gemm_w8a8.cpp.
Attention of rows that decode: decode.cpp, over latents latent.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ops import emulated

NUM_COMPILERS = 2
PROGRAMS = {  # the kernels' files, and rounds that are enough
    "few_rows": (("linear/few_rows.cuh",), 2),
    "few_rows_lora": (
        (
            "lora/lora.h",
            "linear/linear_lora.h",
            "lora/segments.cuh",
            "linear/few_rows.cuh",
            "linear/few_rows_lora.cuh",
        ),
        8,
    ),
    "few_rows_w4a16_lora": (
        (
            "lora/lora.h",
            "linear/linear_lora.h",
            "lora/segments.cuh",
            "linear/few_rows.cuh",
            "linear/few_rows_lora.cuh",
            "linear/w4a16_words.cuh",
            "linear/few_rows_w4a16.cuh",
            "linear/few_rows_w4a16_lora.cuh",
        ),
        2,
    ),
    "few_rows_w4a16": (
        ("linear/few_rows.cuh", "linear/w4a16_words.cuh", "linear/few_rows_w4a16.cuh"),
        1,
    ),
    "few_rows_fp8": (
        ("linear/few_rows.cuh", "linear/fp8_numbers.cuh", "linear/few_rows_fp8.cuh"),
        2,
    ),
    "grouped_few_rows": (
        ("linear/few_rows.cuh", "experts/work_list.cuh", "experts/grouped_few_rows.cuh"),
        3,
    ),
    "grouped_few_rows_fp8": (
        (
            "linear/few_rows.cuh",
            "linear/fp8_numbers.cuh",
            "linear/few_rows_fp8.cuh",
            "experts/work_list.cuh",
            "experts/grouped_few_rows.cuh",
            "experts/grouped_few_rows_fp8.cuh",
        ),
        3,
    ),
    "grouped_few_rows_w4a16": (
        (
            "linear/few_rows.cuh",
            "linear/w4a16_words.cuh",
            "linear/few_rows_w4a16.cuh",
            "experts/work_list.cuh",
            "experts/grouped_few_rows.cuh",
            "experts/grouped_few_rows_w4a16.cuh",
        ),
        3,
    ),
    "gemm_w4a16": (
        (
            "linear/w4a16.h",
            "linear/w4a16_words.cuh",
            "linear/gemm_frame.cuh",
            "linear/gemm_estimate.h",
            "linear/gemm_w4a16.cuh",
            "linear/gemm_w4a16_sm90a.cu",
        ),
        2,
    ),
    "gemm_w8a8": (
        (
            "linear/fp8.h",
            "linear/w8a8.h",
            "linear/quantise_rows.cuh",
            "linear/gemm_frame.cuh",
            "linear/gemm_estimate.h",
            "linear/gemm_sm90a.cuh",
            "linear/gemm_w8a8.cuh",
            "linear/gemm_w8a8_sm90a.cu",
        ),
        4,
    ),
    "grouped_gemm_w4a16": (
        (
            "linear/w4a16.h",
            "linear/w4a16_words.cuh",
            "linear/gemm_frame.cuh",
            "linear/gemm_w4a16.cuh",
            "experts/work_list.cuh",
            "experts/grouped_schedule.cuh",
            "experts/grouped_w4a16.h",
            "experts/grouped_gemm_w4a16_sm90a.cu",
        ),
        1,
    ),
    "decode": (
        (
            "attention/attention.h",
            "attention/merge.cuh",
            "attention/score_scale.cuh",
            "core/rotate.cuh",
            "core/swizzle.cuh",
            "attention/decode_loader.cuh",
            "attention/new_key.cuh",
            "attention/decode_queries.cuh",
            "attention/decode_kernel.cuh",
        ),
        4,
    ),
    "latent": (
        (
            "attention/attention.h",
            "attention/merge.cuh",
            "core/swizzle.cuh",
            "attention/latent_work.cuh",
            "attention/latent_merge.cuh",
            "attention/latent_kernel.cuh",
        ),
        4,
    ),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """All are compiled while the first ones run."""
    with ThreadPoolExecutor(NUM_COMPILERS) as pool:
        yield {
            name: pool.submit(emulated.build, tmp_path_factory.mktemp("few"), name, kernels)
            for name, (kernels, _) in PROGRAMS.items()
        }


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, programs: dict[str, Future[Path]]) -> tuple[Path, int]:
    return programs[request.param].result(), PROGRAMS[request.param][1]


def test_every_tiling_gives_the_sums_of_float64(program: tuple[Path, int]) -> None:
    done = emulated.run(*program, num_too_early=0)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_kernel_that_reads_too_early_is_found_out(program: tuple[Path, int]) -> None:
    done = emulated.run(*program, num_too_early=1)
    assert done.returncode == 1 and "wrong" in done.stdout, done.stdout + done.stderr
