"""CudaCompiler: which nvcc is used, for which cards it compiles, and with which flags.

Uses only the standard library, for the reason that toolchain.py gives.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

MIN_CUDA = (12, 6)
ARCHS_VARIABLE = "PYSERVE_CUDA_ARCHS"
# Architectures of a wheel: all cards from Ampere on, and PTX for future cards.
_WHEEL_ARCHS = ("80", "86", "89", "90a", "120", "80-ptx")
_NEW_ARCHS = {"120": (12, 8)}  # architecture -> the first CUDA version that supports it
# nvcc's front end takes most of the time and runs once for each virtual architecture. Its PTX for
# compute_86 and compute_89 equals that for compute_80 but for the names, so one run serves all.
_FRONT_ENDS = {"86": "80", "89": "80"}
# -Xptxas=-v writes each kernel's registers and memory to the log.
_CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")


class CompileError(Exception):
    """The message is one line for the user: what is missing, or where the compiler's log is."""


class NoCudaCompilerError(CompileError):
    """There is no nvcc on this machine."""


@dataclass(frozen=True)
class CudaCompiler:
    """An nvcc, and the architectures that it compiles for.

    An architecture is a compute capability without the dot: "86" for machine code, "90a" for
    machine code with features that only this capability has, "80-ptx" for code that the driver
    compiles for any later card.
    """

    nvcc: str
    version: tuple[int, int]
    archs: tuple[str, ...]
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]

    def archs_of(self, source: Path) -> tuple[str, ...]:
        """The architectures that `source` is compiled for. A file `*_sm90a.cu` is compiled for 90a
        alone, or not at all. Raises CompileError for a file named after another architecture."""
        own = re.search(r"_sm(\w+)\.cu$", source.name)
        if own is not None and own[1] not in _WHEEL_ARCHS:
            raise CompileError(f"{source} is named after {own[1]}, not one of {_WHEEL_ARCHS}")
        return tuple(arch for arch in self.archs if own is None or arch == own[1])

    def flags(self, source: Path | None = None) -> tuple[str, ...]:
        """nvcc's flags for `source`; None: for all architectures.

        The macro PYSERVE_SM90A tells launchers that the kernels of `*_sm90a.cu` are compiled
        (core/device.h).
        """
        archs = self.archs if source is None else self.archs_of(source)
        defines = (f"-DPYSERVE_SM{arch.upper()}" for arch in self.archs if arch[-1] == "a")
        parallel = () if len(archs) == 1 else ("--threads=4",)
        return (*_CUDA_FLAGS, *defines, *parallel, *(f"-gencode={_gencode(a)}" for a in archs))

    def bind_flags(self) -> tuple[str, ...]:
        """Further flags for the C++ files that bind the kernels to torch."""
        return ("-DUSE_CUDA", *(f"-isystem{folder}" for folder in self.include_dirs))

    def link_flags(self) -> tuple[str, ...]:
        """Further linker flags of `_ops`.

        libtorch is linked although none of its symbols is used, because it depends on libtorch_cuda
        if torch has CUDA. The symbols of the static CUDA runtime are hidden, as torch's own runtime
        has the same names.
        """
        folders = (f"-L{folder}" for folder in self.library_dirs)
        torch_lib = ("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed")
        runtime = ("-Wl,--exclude-libs,ALL", "-lcudart_static", "-lrt", "-lpthread", "-ldl")
        return (*torch_lib, *folders, *runtime)


def find_cuda_compiler(
    env: Mapping[str, str],
    *,
    capability: tuple[int, int] | None = None,
    driver: tuple[int, int] | None = None,
) -> CudaCompiler:
    """Find the first suitable nvcc in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or pip's package.

    env         the environment; PYSERVE_CUDA_ARCHS in it overrides the architectures.
    capability  compile for this card; None: for all cards.
    driver      the newest CUDA version of its driver; None: do not check.

    Raises NoCudaCompilerError if there is no nvcc, CompileError if none is suitable.
    """
    wanted = env.get(ARCHS_VARIABLE)
    if wanted == "none":
        raise NoCudaCompilerError(f"{ARCHS_VARIABLE} is none")
    reasons = []
    for nvcc in _nvcc_candidates(env):
        version = _nvcc_version(nvcc)
        if version is None:
            reasons.append(f"{nvcc} does not say its version")
        elif version < MIN_CUDA:
            reasons.append(
                f"nvcc {dotted(version)} at {nvcc}: {dotted(MIN_CUDA)} or later is needed"
            )
        elif driver is not None and version[0] > driver[0]:
            reasons.append(
                f"nvcc {dotted(version)} at {nvcc} is newer than the NVIDIA driver, "
                f"which supports CUDA {dotted(driver)}: update the driver"
            )
        else:
            archs = _archs(nvcc, version, wanted, capability)
            return CudaCompiler(nvcc, version, archs, *_cuda_dirs(nvcc))
    if reasons:
        raise CompileError(reasons[0])
    raise NoCudaCompilerError("no CUDA compiler (nvcc) found")


def card_arch(capability: tuple[int, int], known: Collection[str]) -> str:
    """The architecture to compile for a card; `known` are those that nvcc supports."""
    number = f"{capability[0]}{capability[1]}"
    if number == "90":
        return "90a"  # allows instructions that only Hopper has, such as wgmma
    return number if number in known else "80-ptx"


def dotted(version: tuple[int, int]) -> str:
    """A version or a compute capability as a string, for example "12.6"."""
    return ".".join(map(str, version))


def _nvcc_candidates(env: Mapping[str, str]) -> list[str]:
    """The paths of all nvccs on this machine, in the order of preference."""
    folders = [f"{env[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    folders += [*env.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    spec = importlib.util.find_spec("nvidia")  # the namespace of pip's CUDA packages
    for package in [] if spec is None else spec.submodule_search_locations or []:
        folders += sorted(map(str, Path(package).glob("cu[0-9]*/bin")), reverse=True)
    found = (shutil.which("nvcc", path=folder) for folder in folders if folder)
    return list(dict.fromkeys(nvcc for nvcc in found if nvcc is not None))


def _nvcc_version(nvcc: str) -> tuple[int, int] | None:
    match = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version"))
    return None if match is None else (int(match[1]), int(match[2]))


def _archs(
    nvcc: str, version: tuple[int, int], wanted: str | None, capability: tuple[int, int] | None
) -> tuple[str, ...]:
    if wanted:
        archs = tuple(wanted.split(","))
        for arch in archs:
            if not re.fullmatch(r"\d{2,3}[af]?(-ptx)?", arch):
                raise CompileError(
                    f"{ARCHS_VARIABLE}: {arch!r} is no architecture: "
                    "none, or a list as 80,86,89,90a,80-ptx"
                )
        return archs
    if capability is None:
        return tuple(a for a in _WHEEL_ARCHS if version >= _NEW_ARCHS.get(a, MIN_CUDA))
    known = re.findall(r"sm_(\d+)\b", ask(nvcc, "--list-gpu-code"))
    return (card_arch(capability, known),)


def _cuda_dirs(nvcc: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders of a toolkit's headers and static runtime, as its nvcc prints them."""
    text = ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull)

    def folders(name: str, flag: str) -> list[str]:
        match = re.search(rf"^#\$ {name}=(.*)$", text, re.MULTILINE)
        words = [] if match is None else shlex.split(match[1])
        return [os.path.realpath(w.removeprefix(flag)) for w in words if w.startswith(flag)]

    # In pip's package the libraries are in lib, although its nvcc says lib64.
    libraries = folders("LIBRARIES", "-L") + [f"{top}/lib" for top in folders("TOP", "")]
    found = (folder for folder in libraries if Path(folder, "libcudart_static.a").is_file())
    return tuple(folders("INCLUDES", "-I")), tuple(dict.fromkeys(found))


def ask(program: str, *arguments: str) -> str:
    """The output of a program, stdout then stderr; "" if it cannot be run."""
    try:
        asked = subprocess.run([program, *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return asked.stdout + asked.stderr


def _gencode(arch: str) -> str:
    number, _, ptx = arch.partition("-")
    if ptx:
        return f"arch=compute_{number},code=compute_{number}"
    return f"arch=compute_{_FRONT_ENDS.get(number, number)},code=sm_{number}"
