"""A wheel for every card, built from this checkout with nvcc, and what ptxas said of its kernels.

With test_cuda_build.py among the tests the build begins when they do, at the lowest priority, and
the tests of it come last: most tests use one core or wait, and the build takes what is left.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyserve.ops import nvcc, toolchain

ROOT = Path(__file__).resolve().parents[2]
STASH_KEY = pytest.StashKey["Build"]()


@dataclass
class Kernel:
    """An instance of a kernel, float16 and bfloat16 as one: the larger figures."""

    static_smem: dict[str, int] = field(default_factory=dict)  # by architecture
    dynamic_smem: int = 0
    registers: int = 0

    def smem(self, arch: str) -> int:
        return self.static_smem[arch] + self.dynamic_smem


@dataclass
class Wheel:
    """A built wheel, unpacked, and what nvcc said."""

    folder: Path
    sources: Path  # what it was built of
    objects: Path
    log: str  # demangled
    kernels: dict[str, Kernel]

    @property
    def ops(self) -> Path:
        return self.folder / "pyserve" / "ops" / toolchain.OPS_PRODUCT


@dataclass
class Build:
    """`pip wheel` at work on a copy of this checkout, for every card."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def finish(self) -> Wheel:
        """Wait for the end; AssertionError with the compiler's words where it failed."""
        with suppress(PermissionError):  # nobody else is left; only root may take a core back
            os.setpriority(os.PRIO_PGRP, self.process.pid, 0)
        self.process.wait()
        printed = (self.folder / "printed").read_text()
        logs = list(self.source.glob(f"build/*/native/{toolchain.LOG_NAME}"))
        log = logs[0].read_text() if logs else ""
        errors = [line for line in log.splitlines() if re.search(r"error|FAILED", line)]
        assert self.process.returncode == 0, "\n".join(errors) or printed
        (wheel,) = (self.folder / "out").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.folder / "wheel")
        log = demangle(log)
        objects = logs[0].parent / "_ops"
        kernels = read_kernels(log, objects)
        return Wheel(self.folder / "wheel", self.source / "cuda", objects, log, kernels)


def can_build() -> bool:
    """Whether nvcc is here, and binutils to read what it made."""
    try:
        nvcc.find_cuda_compiler({**os.environ, nvcc.ARCHS_VARIABLE: ""})
    except nvcc.CompileError:
        return False
    return shutil.which("c++filt") is not None


@contextmanager
def building() -> Iterator[Build]:
    """A build that has begun; what still runs at the end is killed, what it wrote is deleted."""
    with tempfile.TemporaryDirectory(prefix="pyserve-cuda-build-") as scratch:
        folder = Path(scratch)
        ignore = shutil.ignore_patterns("*.so", "native.json", "__pycache__")
        for name in ("pyserve", "cuda"):
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / "source")
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
        env = {k: v for k, v in os.environ.items() if k != nvcc.ARCHS_VARIABLE}
        with (folder / "printed").open("w") as sink:
            process = subprocess.Popen(
                [*pip, "-w", folder / "out", folder / "source"], env=env, stdout=sink,
                stderr=sink, preexec_fn=_step_back,
            )  # fmt: skip
        try:
            yield Build(folder, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _step_back() -> None:
    """Into a group of its own, to be killed as one, at the lowest priority."""
    os.setpgid(0, 0)
    os.nice(19)


def demangle(names: str) -> str:
    done = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    return done.stdout


def read_kernels(log: str, objects: Path) -> dict[str, Kernel]:
    """Kernel instances by name, from ptxas's report and from the names that allow_smem leaves."""
    kernels: dict[str, Kernel] = {}
    report = re.compile(
        r"Compiling entry function '(.+)' for 'sm_(\w+)'\n.*\n"
        r".*stack frame.*\n.*Used (\d+) registers(.*)\n"
    )
    for name, arch, registers, rest in report.findall(log):
        kernel = kernels.setdefault(short_name(name), Kernel())
        smem = re.search(r"(\d+) bytes smem", rest)
        size = int(smem[1]) if smem else 0
        kernel.static_smem[arch] = max(size, kernel.static_smem.get(arch, 0))
        kernel.registers = max(int(registers), kernel.registers)
    for path in objects.glob("gpu_*.o"):
        listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for name, size in re.findall(r"allow_smem<&\(?(.+?)\)?, (\d+)ul>\(\)", listed.stdout):
            kernel = kernels[short_name(name)]
            kernel.dynamic_smem = max(int(size), kernel.dynamic_smem)
    return kernels


def short_name(signature: str) -> str:
    """linear_kernel<T, Epilogue 0, Tiling<1, 64> > of a demangled signature."""
    name = signature.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\(([\w:]+)\)(\d)", r"\1 \2", name)  # an enumerator
    name = re.sub(r"\b(\w+::)+", "", re.sub(r"__half|__nv_bfloat16", "T", name))
    return name.partition("(")[0]
