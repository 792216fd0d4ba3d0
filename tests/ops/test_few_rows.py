"""The CUDA kernel for few rows of a linear, its source compiled for a CPU: few_rows.cpp."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pyserve.ops import toolchain

ROOT = Path(__file__).resolve().parents[2]
KERNEL = ROOT / "cuda" / "gpu" / "linear" / "few_rows.cuh"
SHARED = "extern __shared__ __align__(128) unsigned char dynamic_smem[];"
MACHINE_SHARED = "unsigned char* dynamic_smem = machine::shared;"
WAIT = "cp_async_wait<Tile::kStages - 2>()"
MACHINE_WAIT = "cp_async_wait<Tile::kStages - 2>(machine::num_early)"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel in all of its tilings."""
    folder = tmp_path_factory.mktemp("few_rows")
    source = KERNEL.read_text()
    for text, other in {SHARED: MACHINE_SHARED, WAIT: MACHINE_WAIT}.items():
        assert source.count(text) == 1, text
        source = source.replace(text, other)
    kept = re.sub(r"^(#include|#pragma|namespace|}  // namespace).*\n", "", source, flags=re.M)
    (folder / "few_rows.inc").write_text(kept)
    compiler = toolchain.find_toolchain(os.environ.get("CXX"), march=None).compiler
    flags = ["-std=c++20", "-O1", f"-I{folder}"]
    file = Path(__file__).with_name("few_rows.cpp")
    subprocess.run([compiler, *flags, file, "-o", folder / "few_rows"], check=True)
    return folder / "few_rows"


def run(program: Path, num_rounds: int, num_early: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(num_rounds), str(num_early)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_every_tiling_gives_the_sums_of_float64(program: Path) -> None:
    done = run(program, 2, 0)  # copies land late in the first, at once in the second
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_kernel_that_reads_too_early_is_found_out(program: Path) -> None:
    assert run(program, 1, 1).returncode == 1
