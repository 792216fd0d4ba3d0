"""nvcc: which one is taken, for which cards it compiles, and with which flags.

Only the standard library is needed here, as in toolchain.py, and for the same reason.
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
# Of binaries that travel: all cards from Ampere on, and PTX for those that are not known yet.
_WHEEL_ARCHS = ("80", "86", "89", "90a", "120", "80-ptx")
_NEW_ARCHS = {"120": (12, 8)}  # the CUDA that brought it
# nvcc's front end, which takes most of the time, runs once for all that is made of one virtual
# architecture. Its PTX for compute_80 is that for compute_86 and 89, but for their names.
_FRONT_ENDS = {"86": "80", "89": "80"}
# The log tells each kernel's registers and memory.
_CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")


class CompileError(Exception):
    """One line for a user: what is missing, or where the compiler's log lies."""


class NoCudaCompilerError(CompileError):
    """There is no nvcc on this machine."""


@dataclass(frozen=True)
class CudaCompiler:
    """nvcc, and what it compiles for.

    An architecture is a compute capability without the dot ("86", "90a": machine code that only
    its own card runs), or one with "-ptx": code that the driver translates for any later card.
    """

    nvcc: str
    version: tuple[int, int]
    archs: tuple[str, ...]
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]

    def archs_of(self, source: Path) -> tuple[str, ...]:
        """What `source` is compiled for: `*_sm90a.cu` for that architecture alone, if at all."""
        own = re.search(r"_sm(\w+)\.cu$", source.name)
        if own is not None and own[1] not in _WHEEL_ARCHS:
            raise CompileError(f"{source} is named after {own[1]}, not one of {_WHEEL_ARCHS}")
        return tuple(arch for arch in self.archs if own is None or arch == own[1])

    def flags(self, source: Path | None = None) -> tuple[str, ...]:
        """nvcc's flags, for all archs or for what `source` is compiled for.

        PYSERVE_SM90A tells launchers that the kernels of `*_sm90a.cu` are there: core/device.h.
        """
        archs = self.archs if source is None else self.archs_of(source)
        defines = (f"-DPYSERVE_SM{arch.upper()}" for arch in self.archs if arch[-1] == "a")
        parallel = () if len(archs) == 1 else ("--threads=4",)
        return (*_CUDA_FLAGS, *defines, *parallel, *(f"-gencode={_gencode(a)}" for a in archs))

    def bind_flags(self) -> tuple[str, ...]:
        """Further C++ flags of the files between torch and the kernels."""
        return ("-DUSE_CUDA", *(f"-isystem{folder}" for folder in self.include_dirs))

    def link_flags(self) -> tuple[str, ...]:
        """Further linker flags of `_ops`.

        libtorch, of which nothing is used by name, is what leads to libtorch_cuda where torch has
        it. Symbols of the static runtime stay inside: torch's runtime has the same.
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
    """The first nvcc that will do, for a card of `capability` (None: for all cards) and its driver.

    Looked for in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and pip's package; PYSERVE_CUDA_ARCHS
    in `env` overrides the architectures. Raises NoCudaCompilerError where there is none,
    CompileError where none will do.
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
    """What to compile for a card; `known` are the architectures that nvcc makes machine code of."""
    number = f"{capability[0]}{capability[1]}"
    if number == "90":
        return "90a"  # with the instructions that only Hopper has
    return number if number in known else "80-ptx"


def dotted(version: tuple[int, int]) -> str:
    """A version or a compute capability as people write it: "12.6"."""
    return ".".join(map(str, version))


def _nvcc_candidates(env: Mapping[str, str]) -> list[str]:
    """Every nvcc of this machine, in the order of preference."""
    folders = [f"{env[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    folders += [*env.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    spec = importlib.util.find_spec("nvidia")  # of pip's packages
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
    """Folders of the headers and of the static runtime of a toolkit, as its nvcc names them."""
    text = ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull)

    def folders(name: str, flag: str) -> list[str]:
        match = re.search(rf"^#\$ {name}=(.*)$", text, re.MULTILINE)
        words = [] if match is None else shlex.split(match[1])
        return [os.path.realpath(w.removeprefix(flag)) for w in words if w.startswith(flag)]

    # In pip's package they lie in lib, though its nvcc says lib64.
    libraries = folders("LIBRARIES", "-L") + [f"{top}/lib" for top in folders("TOP", "")]
    found = (folder for folder in libraries if Path(folder, "libcudart_static.a").is_file())
    return tuple(folders("INCLUDES", "-I")), tuple(dict.fromkeys(found))


def ask(program: str, *arguments: str) -> str:
    """What a program prints; empty where it cannot be run."""
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
