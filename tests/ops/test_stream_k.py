"""How the matrix products of skinny_sm90a.cu are divided over the SMs: stream_k.cpp."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pyserve.ops import toolchain

SOURCES = Path(__file__).resolve().parents[2] / "cuda"


def test_every_stage_is_in_one_piece_and_every_part_is_found(tmp_path: Path) -> None:
    compiler = toolchain.find_toolchain(os.environ.get("CXX"), march=None).compiler
    file, program = Path(__file__).with_name("stream_k.cpp"), tmp_path / "stream_k"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, file, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
