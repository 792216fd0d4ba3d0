"""How the native products are compiled: sources, flags, ninja. No other file has compiler flags.

There are two products: `_ops` (tensor ops on torch's stable ABI: one binary for torch 2.10 and
later, without Python) and `_host` (pybind11, without torch). With a CUDA compiler, `_ops` holds the
CUDA ops too. The CUDA runtime is linked into it statically, so that it does not matter with which
CUDA torch was built. This file and nvcc.py need only the standard library, because setup.py runs
them where pyserve's dependencies may not be installed; torch and pybind11 are only located.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import select
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyserve.ops.nvcc import CompileError, CudaCompiler, ask

OPS_PRODUCT = "_ops.so"
HOST_PRODUCT = "_host.so"
HOST_SOURCE = "host.cpp"
LOG_NAME = "build.log"
NINJA_FILE = "build.ninja"
SCRATCH_NAME = "tmp"  # folder for temporary files, in build_dir
TICK_S = 0.5  # longest interval between two reports of a compile's progress
# Runs a command that gets SIGTERM from the kernel when the thread that started it ends. ninja then
# ends its compilers and removes their incomplete output. Arguments: the process id of the starter,
# then the command.
_ENDS_WITH_ME = (sys.executable, "-I", "-S", "-c", """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):  # else it has gone already
    os.execv(sys.argv[2], sys.argv[2:])
""")  # fmt: skip
PORTABLE_X86 = "x86-64-v3"
# Flags that /proc/cpuinfo must list for PORTABLE_X86 code to run.
PORTABLE_X86_FLAGS = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})

TORCH_TARGET = "0x020a000000000000"  # the oldest torch that the binary must work with: 2.10
_COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the sampler is specified bit for bit; fused operations are explicit
    "-Wall",
)
_SANITIZE_FLAGS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1")


@dataclass(frozen=True)
class Toolchain:
    """Everything but the sources that determines what the compiler produces."""

    compiler: str
    march: str | None  # value of -march; None: the compiler's default
    is_sanitized: bool = False
    cuda: CudaCompiler | None = None

    def version(self) -> str:
        """The first line of the compiler's --version; "" if it prints none."""
        return ask(self.compiler, "--version").partition("\n")[0]

    def flags(self) -> tuple[str, ...]:
        """Compiler flags of both products."""
        march = () if self.march is None else (f"-march={self.march}",)
        return _COMMON_FLAGS + march + (_SANITIZE_FLAGS if self.is_sanitized else ())

    def ops_flags(self) -> tuple[str, ...]:
        """Further flags of `_ops`."""
        torch = _package("torch")
        return (f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", f"{torch}/include")

    def host_flags(self) -> tuple[str, ...]:
        """Further flags of `_host`."""
        python = sysconfig.get_paths()["include"]
        if not (Path(python) / "Python.h").is_file():
            raise CompileError("Python.h is missing: install python3-dev")
        return ("-isystem", f"{_package('pybind11')}/include", "-isystem", python)

    def link_flags(self) -> tuple[str, ...]:
        """Linker flags of both products; torch's libraries are in the process when _ops loads."""
        sanitize = ("-fsanitize=address,undefined",) if self.is_sanitized else ()
        return ("-shared", *sanitize)


def find_toolchain(cxx: str | None, *, march: str | None, is_sanitized: bool = False) -> Toolchain:
    """Find the C++ compiler: `cxx` (of the environment) if given, else the system's.

    Raises CompileError.
    """
    for name in (cxx,) if cxx else ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return Toolchain(path, march, is_sanitized)
    wanted = f"CXX={cxx} is not a program" if cxx else "no C++ compiler found"
    raise CompileError(f"{wanted}: install one (Debian, Ubuntu: apt install g++ python3-dev)")


def portable_march() -> str | None:
    """-march for binaries that must run on other machines; None: the compiler's default."""
    return PORTABLE_X86 if platform.machine() == "x86_64" else None


def source_files(source_dir: Path, *, has_cuda: bool) -> list[Path]:
    """All source and header files of the products, sorted."""
    return sorted(
        path
        for path in source_dir.rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
        and (has_cuda or source_dir / "gpu" not in path.parents)
        and path.is_file()
    )


def source_hash(source_dir: Path, *, has_cuda: bool) -> str:
    """Hash of the sources' names and contents."""
    digest = hashlib.sha256()
    for path in source_files(source_dir, has_cuda=has_cuda):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source_dir)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cpu_identity() -> str:
    """What the result of -march=native depends on: machine type, CPU model and CPU flags."""
    lines = [platform.machine()]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    for key in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
        match = re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE)
        if match is not None:
            lines.append(" ".join(sorted(match[1].split())))
    return "\n".join(lines)


def compile_products(
    source_dir: Path,
    build_dir: Path,
    toolchain: Toolchain,
    *,
    progress: Callable[[int, int], None],
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
) -> None:
    """Compile both products into build_dir. Objects that an earlier run has completed are kept.

    progress  called as progress(done, total) at the end of each compiler run and every TICK_S
              seconds; counts compiler runs, with a total of 0 until the first has ended.
    env       environment of the compilers.
    pass_fds  file descriptors that stay open in them.

    The compilers end when this process does, however it ends. Raises CompileError; the compilers'
    output is in build_dir / LOG_NAME.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / NINJA_FILE).write_text(_ninja_file(source_dir, toolchain), encoding="utf-8")
    log_path = build_dir / LOG_NAME
    with log_path.open("wb") as log_file, _scratch_folder(build_dir):
        process = subprocess.Popen(
            [*_ENDS_WITH_ME, str(os.getpid()), _find_ninja(), "-C", str(build_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**env, "NINJA_STATUS": "[%f/%t] ", "TMPDIR": SCRATCH_NAME},
            pass_fds=pass_fds,
        )
        counts = (0, 0)
        with process:
            assert process.stdout is not None
            try:
                for text in _output_and_ticks(process.stdout.fileno()):
                    log_file.write(text)
                    log_file.flush()  # other processes that wait for this compile read the log
                    news = last_counts(text)
                    counts = news or counts
                    if news or not text:
                        progress(*counts)
            except BaseException:  # also KeyboardInterrupt: the start is given up
                process.terminate()
                raise
    if process.returncode != 0:
        raise CompileError(f"compiling the native ops failed, see {log_path}")


@contextmanager
def _scratch_folder(build_dir: Path) -> Iterator[None]:
    """A folder for temporary files of compilers; nvcc leaves its files behind when it is killed."""
    scratch = build_dir / SCRATCH_NAME
    shutil.rmtree(scratch, ignore_errors=True)  # left by a compile that was killed
    scratch.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def last_counts(text: bytes) -> tuple[int, int] | None:
    """(done, total) from the last line with ninja's counts in a compile's log; None: no such."""
    found = re.findall(rb"^\[(\d+)/(\d+)\] ", text, re.MULTILINE)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def _output_and_ticks(fd: int) -> Iterator[bytes]:
    """Yield whole lines from `fd` as they come, and b"" if nothing comes for TICK_S seconds."""
    text, poll = b"", select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        if not poll.poll(1000 * TICK_S):
            yield b""
            continue
        piece = os.read(fd, 65536)
        if not piece:
            yield text
            return
        lines, _, text = (text + piece).rpartition(b"\n")
        if lines:
            yield lines + b"\n"


def _ninja_file(source_dir: Path, toolchain: Toolchain) -> str:
    """The text of build.ninja. Both products are in one graph, so that all cores have work."""
    lines = [
        "ninja_required_version = 1.3",
        "rule compile",
        "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $compiler $in $flags -o $out",
        f"compiler = {_words(toolchain.compiler)}",
    ]

    def compile_to(product: str, source: Path, compiler: str, flags: Iterable[str]) -> str:
        path = source.relative_to(source_dir).with_suffix(".o")
        name = f"{product.removesuffix('.so')}/{'_'.join(path.parts)}"
        lines.append(f"build {name}: compile {_escape(str(source))}")
        lines.append(f"  compiler = {_words(compiler)}")
        lines.append(f"  flags = {_words(*flags)}")
        return name

    def link(product: str, objects: Iterable[str], *libraries: str) -> None:
        lines.append(f"build {product}: link {' '.join(objects)}")
        lines.append(f"  flags = {_words(*toolchain.link_flags(), *libraries)}")

    cuda, cxx = toolchain.cuda, toolchain.compiler
    ops_flags = (*toolchain.flags(), *toolchain.ops_flags())
    host, ops = [], []
    for source in compiled_files(source_dir, cuda):
        if source == source_dir / HOST_SOURCE:
            host_flags = (*toolchain.flags(), *toolchain.host_flags())
            host.append(compile_to(HOST_PRODUCT, source, cxx, host_flags))
        elif cuda is None or source_dir / "gpu" not in source.parents:
            ops.append(compile_to(OPS_PRODUCT, source, cxx, ops_flags))
        elif source.suffix == ".cu":
            flags = (*cuda.flags(source), "-ccbin", cxx, f"-I{source_dir}")
            ops.append(compile_to(OPS_PRODUCT, source, cuda.nvcc, flags))
        else:
            bind_flags = (*ops_flags, *cuda.bind_flags(), f"-I{source_dir}")
            ops.append(compile_to(OPS_PRODUCT, source, cxx, bind_flags))
    link(HOST_PRODUCT, host)
    torch_lib = (f"-L{_package('torch')}/lib", "-ltorch_cpu")
    link(OPS_PRODUCT, ops, *torch_lib, *(() if cuda is None else cuda.link_flags()))
    return "\n".join(lines) + "\n"


def compiled_files(source_dir: Path, cuda: CudaCompiler | None) -> list[Path]:
    """The files that are compiled, in the order of the ninja file.

    Those that take longest come first: kernels by size, then host.cpp (pybind11), then the others.
    """
    files = [source_dir / HOST_SOURCE, source_dir / "ops.cpp"]
    files += sorted((source_dir / "cpu").glob("*.cpp"))
    if cuda is not None:
        kernels = (path for path in cuda_sources(source_dir) if cuda.archs_of(path))
        files = [*kernels, *files, *sorted((source_dir / "gpu").rglob("*.cpp"))]
    return files


def cuda_sources(source_dir: Path) -> list[Path]:
    """The files that nvcc compiles, the largest first."""
    return sorted((source_dir / "gpu").rglob("*.cu"), key=lambda path: -path.stat().st_size)


def _words(*words: str) -> str:
    """Quote words for a shell command, and escape the result for ninja."""
    return " ".join(map(shlex.quote, words)).replace("$", "$$")


def _escape(path: str) -> str:
    """Escape a path for a build line; ninja itself quotes it for the shell."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _package(name: str) -> Path:
    """The folder of an installed package, which is found without importing it.

    Raises CompileError.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"the Python package {name} is missing: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def _find_ninja() -> str:
    """The path of the Python package's ninja, which may not be on PATH, or else of the one on PATH.

    Raises CompileError.
    """
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    user = Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))) / "ninja"
    for path in (beside, user):
        if os.access(path, os.X_OK):
            return str(path)
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("ninja is missing: pip install ninja")
    return found
