"""CUDA kernels of linear, experts and attention, their sources compiled for a CPU: emulated.h says
how they run there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from pyserve.ops import toolchain

SOURCES = Path(__file__).resolve().parents[2] / "cuda"
SHARED = re.compile(r"extern __shared__ __align__\(\d+\) unsigned char dynamic_smem\[\];")
MACHINE_SHARED = "unsigned char* dynamic_smem = machine::block_shared();"


def build(folder: Path, name: str, kernels: tuple[str, ...]) -> Path:
    """The program of name.cpp, which includes each of cuda/gpu's files `kernels` as .inc."""
    for kernel in kernels:
        path = SOURCES / "gpu" / kernel
        source = SHARED.sub(MACHINE_SHARED, path.read_text())
        assert "extern __shared__" not in source, kernel
        kept = re.sub(r"^(#include|#pragma|namespace|}  // namespace).*\n", "", source, flags=re.M)
        (folder / f"{path.name}.inc").write_text(kept)
    compiler = toolchain.find_toolchain(os.environ.get("CXX"), march=None).compiler
    program = folder / name
    file = Path(__file__).with_name(f"{name}.cpp")
    # More optimising takes longer than it spares. Checks of longjmp that some compilers switch on
    # take jumps between stacks for errors.
    flags = ["-std=c++20", "-Og", "-U_FORTIFY_SOURCE", f"-I{folder}", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, file, "-o", program], check=True)
    return program


def run(program: Path, num_rounds: int, num_too_early: int) -> subprocess.CompletedProcess[str]:
    """num_too_early: copies that each wait forgets, so that the kernel reads too early."""
    command = [str(program), str(num_rounds), str(num_too_early)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)
