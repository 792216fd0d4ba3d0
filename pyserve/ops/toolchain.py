"""How the native products are compiled: sources, flags, ninja. The only copy of the flags.

`_ops` (tensor ops on torch's stable ABI: one binary for torch 2.10 and later, no Python in it) and
`_host` (pybind11, no torch). Only the standard library is needed here, so that setup.py can execute
this file where pyserve's dependencies are not installed; torch and pybind11 are merely located.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OPS_PRODUCT = "_ops.so"
HOST_PRODUCT = "_host.so"
LOG_NAME = "build.log"
PORTABLE_X86 = "x86-64-v3"
# What /proc/cpuinfo must list for PORTABLE_X86.
PORTABLE_X86_FLAGS = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})

TORCH_TARGET = "0x020a000000000000"  # the oldest torch the binary must load in: 2.10
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


class CompileError(Exception):
    """One line for a user: what is missing, or where the compiler's log lies."""


@dataclass(frozen=True)
class Toolchain:
    """Everything that decides what the compiler produces, besides the sources."""

    compiler: str
    march: str | None  # of -march; None leaves the compiler's default
    sanitize: bool = False

    def version(self) -> str:
        """What the compiler calls itself; empty where it does not say."""
        try:
            asked = subprocess.run([self.compiler, "--version"], capture_output=True, text=True)
        except OSError:
            return ""
        return asked.stdout.partition("\n")[0]

    def flags(self) -> tuple[str, ...]:
        """Compiler flags of both products."""
        march = () if self.march is None else (f"-march={self.march}",)
        return _COMMON_FLAGS + march + (_SANITIZE_FLAGS if self.sanitize else ())

    def ops_flags(self) -> tuple[str, ...]:
        """Further flags of `_ops`."""
        include = f"{_package('torch')}/include"
        return (f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", include)

    def host_flags(self) -> tuple[str, ...]:
        """Further flags of `_host`."""
        python = sysconfig.get_paths()["include"]
        if not (Path(python) / "Python.h").is_file():
            raise CompileError("Python.h is missing: install python3-dev")
        return ("-isystem", f"{_package('pybind11')}/include", "-isystem", python)

    def link_flags(self) -> tuple[str, ...]:
        """Linker flags of both products; torch's libraries are in the process when _ops loads."""
        sanitize = ("-fsanitize=address,undefined",) if self.sanitize else ()
        return ("-shared", *sanitize)


def find_toolchain(cxx: str | None, *, march: str | None, sanitize: bool = False) -> Toolchain:
    """The C++ compiler: `cxx` (of the environment), else the system's. Raises CompileError."""
    for name in (cxx,) if cxx else ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return Toolchain(path, march, sanitize)
    wanted = f"CXX={cxx} is not a program" if cxx else "no C++ compiler found"
    raise CompileError(f"{wanted}: install one (Debian, Ubuntu: apt install g++ python3-dev)")


def portable_march() -> str | None:
    """-march of binaries that travel to other machines."""
    return PORTABLE_X86 if platform.machine() == "x86_64" else None


def source_files(source_dir: Path) -> list[Path]:
    """Every file the products are made of, sorted."""
    return sorted(
        path for path in source_dir.rglob("*") if path.suffix in (".cpp", ".h") and path.is_file()
    )


def source_hash(source_dir: Path) -> str:
    """Hash of the sources' names and contents."""
    digest = hashlib.sha256()
    for path in source_files(source_dir):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source_dir)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cpu_identity() -> str:
    """What -march=native depends on: the machine, its CPU model and flags."""
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
    """Compile both products into build_dir; files an earlier run completed are kept.

    progress(done, total) counts compiler runs. `env` is the compiler's environment, pass_fds stay
    open in it. Raises CompileError, with the compiler's words in build_dir / LOG_NAME.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(_ninja_file(source_dir, toolchain), encoding="utf-8")
    log_path = build_dir / LOG_NAME
    with log_path.open("w", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            [_find_ninja(), "-C", str(build_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**env, "NINJA_STATUS": "[%f/%t] "},
            pass_fds=pass_fds,
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                log_file.write(line)
                match = re.match(r"\[(\d+)/(\d+)\]", line)
                if match is not None:
                    progress(int(match[1]), int(match[2]))
    if process.returncode != 0:
        raise CompileError(f"compiling the native ops failed, see {log_path}")


def _ninja_file(source_dir: Path, toolchain: Toolchain) -> str:
    """Both products in one graph, so that all cores work until the last file."""
    lines = [
        "ninja_required_version = 1.3",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $flags -o $out",
        f"cxx = {_words(toolchain.compiler)}",
    ]
    common = toolchain.flags()
    torch_lib = (f"-L{_package('torch')}/lib", "-ltorch_cpu")
    # host.cpp takes the longest (pybind11): it comes first.
    for product, sources, flags, libraries in (
        (HOST_PRODUCT, [source_dir / "host.cpp"], toolchain.host_flags(), ()),
        (OPS_PRODUCT, _op_sources(source_dir), toolchain.ops_flags(), torch_lib),
    ):
        objects = []
        for source in sources:
            name = f"{product.removesuffix('.so')}/{source.stem}.o"
            objects.append(name)
            lines += [f"build {name}: compile {_escape(str(source))}"]
            lines += [f"  flags = {_words(*common, *flags)}"]
        lines += [f"build {product}: link {' '.join(objects)}"]
        lines += [f"  flags = {_words(*toolchain.link_flags(), *libraries)}"]
    return "\n".join(lines) + "\n"


def _op_sources(source_dir: Path) -> list[Path]:
    return [source_dir / "ops.cpp", *sorted((source_dir / "cpu").glob("*.cpp"))]


def _words(*words: str) -> str:
    """Words of a shell command, in ninja's own escaping."""
    return " ".join(map(shlex.quote, words)).replace("$", "$$")


def _escape(path: str) -> str:
    """A path in a build line; ninja quotes it for the shell itself."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"the Python package {name} is missing: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def _find_ninja() -> str:
    """The ninja of the Python package (its scripts folder need not be on PATH), else PATH's."""
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    user = Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))) / "ninja"
    for path in (beside, user):
        if os.access(path, os.X_OK):
            return str(path)
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("ninja is missing: pip install ninja")
    return found
