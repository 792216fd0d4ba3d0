"""linear of many rows on a CPU without bfloat16 products, which the machine that tests may have:
built for one that every CPU of the last years can stand in for, and run by itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pyserve.ops import toolchain

ROOT = Path(__file__).parent.parent.parent


def test_many_rows_without_products_of_bfloat16(tmp_path: Path) -> None:
    """Any shapes, strides and epilogues: each result is rounded once, nothing else is written."""
    march = toolchain.portable_march()
    if march is not None and not toolchain.PORTABLE_X86_FLAGS <= set(
        toolchain.cpu_identity().split()
    ):
        pytest.skip(f"this CPU cannot run {march}")
    compiler = toolchain.find_toolchain(None, march=march)
    program = tmp_path / "linear_many"
    command = [
        compiler.compiler, *compiler.flags(), *compiler.ops_flags(), f"-I{ROOT / 'cuda'}",
        str(Path(__file__).with_name("linear_many.cpp")), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=250)
    done = subprocess.run([program], check=True, timeout=250, capture_output=True, text=True)
    assert 0.5 < float(done.stdout) < 1.01
