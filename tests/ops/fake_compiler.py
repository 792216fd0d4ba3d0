"""Compilers that only pretend, and what the tests of the build do with them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pyserve.ops import build, toolchain
from tests.waiting import wait_until

# Notes each of its runs, then makes what it was asked for; waits while a file "hold" exists.
FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "no compiler 1.0" && exit
echo run >> {folder}/runs
while [ -e {folder}/hold ]; do sleep 0.05; done
[ -e {folder}/fail ] && {{ echo "some.cpp:1: error: no luck"; exit 1; }}
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && touch "$2" && echo "$2:" > "$2.d"
  shift
done
"""
FAKE_NVCC_ANSWERS = """case $1 in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;;
  --list-gpu-code) echo sm_80; echo sm_86; echo sm_90; exit;;
  --dryrun) echo '#$ TOP={toolkit}' >&2; echo '#$ INCLUDES="-I{toolkit}/include"  ' >&2
    echo '#$ LIBRARIES=  "-L{toolkit}/lib64/stubs" "-L{toolkit}/lib64"' >&2; exit;;
esac
"""
CPU_FILES = toolchain.source_files(build.source_dir(), has_cuda=False)
NUM_SOURCES = sum(path.suffix == ".cpp" for path in CPU_FILES)
NUM_STEPS = NUM_SOURCES + 2  # compiler runs of a full build, with two links

WAIT_S = 120  # for what takes a second or two on a quiet machine

CHILD = """
import sys
from pyserve.ops import build
with build._products(lambda line: print(line, flush=True)) as folder:
    print(folder)
"""


def find_or_compile(
    progress: Callable[[str], None],
    card: build.CudaCard | None = None,
    report: build.Report = build.report_nothing,
) -> Path:
    with build._products(progress, card, report) as products:
        return products


def num_runs(folder: Path) -> int:
    runs = folder / "runs"
    return len(runs.read_text().split()) if runs.exists() else 0


def fake_nvcc(folder: Path, release: str = "13.0") -> Path:
    """A toolkit with a fake nvcc, which compiles as the fake compiler does."""
    toolkit = folder / f"cuda-{release}"
    for name in ("bin", "include", "lib"):
        (toolkit / name).mkdir(parents=True)
    (toolkit / "lib" / "libcudart_static.a").touch()
    answers = FAKE_NVCC_ANSWERS.format(release=release, toolkit=toolkit)
    script = FAKE_COMPILER.format(folder=folder).replace("#!/bin/sh\n", f"#!/bin/sh\n{answers}")
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    return toolkit


def wait_for_runs(folder: Path) -> None:
    wait_until(lambda: num_runs(folder))


def start_child() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name `folder`: of the build tool and its compilers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in command:
                found.append(command)
    return found
