"""Finds or compiles the native libraries `_ops` and `_host` and loads them, or registers their
plain-torch twins instead.

They are looked for in the package, where setup.py puts them, then in a folder of the cache that is
named by the hash of everything they depend on. If neither has them, they are compiled into that
folder, once, for exactly this machine. build_cache.py decides whether a cache can be trusted. If
CUDA is requested, `_ops` holds the CUDA ops too.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from pyserve import config
from pyserve.errors import BuildError
from pyserve.ops import build_cache, cuda_card, fakes, nvcc, reference, toolchain
from pyserve.ops.compile_estimate import NUM_LINKS, CompileEstimate, expected_seconds
from pyserve.ops.nvcc import CompileError, CudaCompiler, NoCudaCompilerError
from pyserve.ops.toolchain import Toolchain

Mode = Literal["native", "reference"]
DeviceKind = Literal["cpu", "cuda"]
PRODUCTS = (toolchain.OPS_PRODUCT, toolchain.HOST_PRODUCT)
MANIFEST_NAME = "native.json"  # describes the products that setup.py has built, beside them
_CPU_REMEDY = "or pass --allow-reference-ops to serve slowly without"
_CUDA_REMEDY = "or pass --device cpu"

Report = Callable[[int, int], None]  # done, total

_lock = threading.Lock()
_mode: Mode | None = None
_host: Any = None
_has_cuda = False
_library: torch.library.Library | None = None  # keeps the twins registered while it lives


def report_nothing(done: int, total: int) -> None:
    """A Report that ignores progress."""


def load_native(
    *,
    is_reference_allowed: bool,
    progress: Callable[[str], None],
    device: DeviceKind = "cpu",
    report: Report = report_nothing,
) -> Mode:
    """Make torch.ops.pyserve and `host()` usable. May be called again, and from any thread.

    The CPU ops are always loaded; those for the current CUDA card only if the first call's `device`
    is "cuda".

    is_reference_allowed  fall back to the plain-torch twins; on a CPU only.
    progress              gets lines for the user.
    report                gets (done, total) of a compile, in expected milliseconds.

    Raises StartupError if the card cannot be used, BuildError if the libraries can be neither found
    nor compiled, or a later call asks for CUDA although the first did not.
    """
    global _mode, _host, _has_cuda
    with _lock:
        if _mode is None:
            card = _current_card() if device == "cuda" else None
            try:
                with _products(progress, card, report) as folder:
                    _host = _load(folder)
                _mode = "native"
            except BuildError as error:
                if card is not None or not is_reference_allowed:
                    remedy = _CPU_REMEDY if card is None else _CUDA_REMEDY
                    raise BuildError(f"{error}; {remedy}") from error
                progress(f"{error}; serving with the plain-torch ops: this is slow")
                _register_reference()
                _host = reference
                _mode = "reference"
            _has_cuda = card is not None
            fakes.register_fakes()
        elif device == "cuda" and not _has_cuda:
            raise BuildError("this process has loaded the native ops without CUDA")
        return _mode


def host() -> Any:
    """The native module `_host`, or reference.py in its place."""
    assert _mode is not None, "load_native has not run"
    return _host


def source_dir() -> Path:
    """The folder of the C++ and CUDA sources, in an installed package or else in the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "cuda"


@dataclass(frozen=True)
class CudaCard:
    """What the CUDA ops must fit. Versions are pairs as (9, 0)."""

    capability: tuple[int, int]
    driver: tuple[int, int]  # the newest CUDA version that the driver supports


def _current_card() -> CudaCard:
    cuda_card.check_cuda()
    index = torch.cuda.current_device()
    return CudaCard(cuda_card.capability(index), cuda_card.driver_version())


@contextmanager
def _products(
    progress: Callable[[str], None], card: CudaCard | None = None, report: Report = report_nothing
) -> Iterator[Path]:
    """Yield the folder that holds both products, with CUDA ops if a card is given.

    Raises BuildError.
    """
    is_sanitized = config.env("PYSERVE_SANITIZE") is not None
    packaged = Path(__file__).resolve().parent
    unfit = "" if is_sanitized else _why_unfit(packaged, card)
    if not is_sanitized and unfit is None:
        yield packaged
        return
    try:
        native = toolchain.find_toolchain(
            config.env("CXX"), march="native", is_sanitized=is_sanitized
        )
        if card is not None:
            native = replace(native, cuda=_find_cuda_compiler(card))
        folder = _cache_dir() / "native" / _key(native)
        yield from _cached(folder, native, progress, report)
    except CompileError as error:
        reason = f"{unfit}; {error}" if unfit else str(error)
        raise BuildError(reason) from error
    except OSError as error:
        raise BuildError(
            f"cannot keep compiled files in {_cache_dir()} ({error.strerror}): "
            "set PYSERVE_CACHE to a writable folder that nobody else can write to"
        ) from error


def _cached(
    folder: Path, native: Toolchain, progress: Callable[[str], None], report: Report
) -> Iterator[Path]:
    """Yield `folder` with complete products in it; compiles them if needed.

    If others could write to `folder`, yields a temporary folder of this process instead.
    """
    reason = build_cache.untrusted_reason(folder)
    if reason is not None:
        progress(
            f"{reason}: compiling for this start alone; set PYSERVE_CACHE to a folder that nobody "
            "else can write to, and it is done once"
        )
        with build_cache.temporary_folder() as alone:
            _compile(alone, native, progress, report)
            yield alone
        return
    if not _is_done(folder):
        _compile(folder, native, progress, report)
    yield folder


def _find_cuda_compiler(card: CudaCard) -> CudaCompiler:
    """The CUDA compiler for a card. Raises CompileError; without an nvcc it says how to get one."""
    try:
        return nvcc.find_cuda_compiler(os.environ, capability=card.capability, driver=card.driver)
    except NoCudaCompilerError as error:
        if card.driver >= (13, 0):  # pip has nvcc from CUDA 13 on
            remedy = 'pip install "cuda-toolkit[nvcc,cccl]==13.0.*"'
        else:
            remedy = f"install NVIDIA's CUDA toolkit {card.driver[0]}.{card.driver[1]}"
        raise NoCudaCompilerError(
            f"{error}: {remedy}, or install a wheel of pyserve that was built with one"
        ) from error


def _cache_dir() -> Path:
    try:
        return config.cache_dir().resolve()
    except RuntimeError as error:  # raised by Path.home()
        raise BuildError("no home folder: set PYSERVE_CACHE to a writable one") from error


def _why_unfit(packaged: Path, card: CudaCard | None) -> str | None:
    """Why the products in the package cannot be used, for a user; None if they can.

    "" if the package has no products, or products of other sources.
    """
    try:
        manifest = json.loads((packaged / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    cuda = manifest.get("cuda")  # absent in the manifests of earlier versions
    sources = toolchain.source_hash(source_dir(), has_cuda=cuda is not None)
    if manifest["sources"] != sources or manifest["soabi"] != sysconfig.get_config_var("SOABI"):
        return ""
    for name, size in manifest.get("sizes", {}).items():  # absent in earlier versions too
        if not (packaged / name).is_file() or (packaged / name).stat().st_size != size:
            return f"the packaged {name} is damaged: install pyserve again"
    if manifest["march"] == toolchain.PORTABLE_X86:
        missing = toolchain.PORTABLE_X86_FLAGS - set(toolchain.cpu_identity().split())
        if missing:
            return f"the packaged ops need a CPU with {', '.join(sorted(missing))}"
    if card is None:
        return None
    if cuda is None:
        return "the packaged ops are without CUDA"
    version, archs = tuple(cuda["version"]), cuda["archs"]
    wanted = config.env(nvcc.ARCHS_VARIABLE)
    if wanted is not None and wanted != ",".join(archs):
        return f"the packaged CUDA ops ({', '.join(archs)}) are not {nvcc.ARCHS_VARIABLE}"
    if version[0] > card.driver[0]:
        return f"the packaged CUDA ops need a driver for CUDA {version[0]}"
    if not covers(archs, card.capability, is_ptx_readable=version <= card.driver):
        number = f"{card.capability[0]}.{card.capability[1]}"
        return f"the packaged CUDA ops ({', '.join(archs)}) are not for compute capability {number}"
    return None


def covers(archs: Iterable[str], capability: tuple[int, int], *, is_ptx_readable: bool) -> bool:
    """Whether code that was compiled for `archs` runs on a card of this compute capability.

    is_ptx_readable  its driver is new enough to compile the PTX in it.
    """
    for arch in archs:
        number, _, ptx = arch.partition("-")
        major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if number[-1] in "af":  # an architecture-specific target runs on this capability only
            if not ptx and (major, minor) == capability:
                return True
        elif ptx:
            if is_ptx_readable and (major, minor) <= capability:
                return True
        elif major == capability[0] and minor <= capability[1]:
            return True
    return False


def _key(native: Toolchain) -> str:
    """A hash of everything that compiled products depend on: sources, flags, torch, machine.

    The paths of headers are left out, so that all environments with the same torch share products.
    """
    cuda = native.cuda
    parts = (
        toolchain.source_hash(source_dir(), has_cuda=cuda is not None),
        native.compiler,
        native.version(),
        *native.flags(),
        *native.link_flags(),
        toolchain.TORCH_TARGET,
        torch.__version__,
        str(sysconfig.get_config_var("SOABI")),
        toolchain.cpu_identity(),
        *(() if cuda is None else (cuda.nvcc, str(cuda.version), *cuda.flags())),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _is_done(folder: Path) -> bool:
    return build_cache.is_whole(folder, PRODUCTS) and not any(
        build_cache.untrusted_reason(folder / name) for name in PRODUCTS
    )


class _CompileProgress:
    """Reports the progress of a compile, by this process or by another one: a line at its start,
    then figures."""

    def __init__(
        self, folder: Path, files: list[Path], progress: Callable[[str], None], report: Report
    ) -> None:
        names = [path.relative_to(source_dir()).as_posix() for path in files]
        self._estimate = CompileEstimate(expected_seconds(names), len(os.sched_getaffinity(0)))
        self._num_files = len(files)
        self._folder = folder
        self._progress = progress
        self._report = report
        self._began_s = 0.0
        self._is_waiting = False
        self._first = 0  # how far another process was when this one began to wait

    def begin(self) -> None:
        """Report that this process starts to compile."""
        self._began_s = time.monotonic()
        self._progress(f"compiling {self._num_files} files for this machine, once ...")
        self.note(0, 0)

    def note(self, num_done: int, num_steps: int) -> None:
        """Report progress; both numbers of steps are 0 until the first step has ended."""
        self._report(*self._at(num_done, num_steps, time.monotonic() - self._began_s))

    def wait(self) -> None:
        """Report the progress of another process that compiles, from the files that it writes.

        Called repeatedly while this process waits for it.
        """
        try:
            began_s = (self._folder / toolchain.NINJA_FILE).stat().st_mtime
            log = (self._folder / toolchain.LOG_NAME).read_bytes()
        except OSError:  # it has not written them yet
            began_s, log = time.time(), b""
        counts = toolchain.last_counts(log) or (0, 0)
        done, total = self._at(*counts, time.time() - began_s)
        if not self._is_waiting:
            self._is_waiting, self._first = True, done
            self._progress("waiting for another process that compiles the native ops ...")
        self._first = min(self._first, done)
        self._report(done - self._first, total - self._first)

    def _at(self, num_done: int, num_steps: int, elapsed_s: float) -> tuple[int, int]:
        num_steps = num_steps or self._num_files + NUM_LINKS
        return self._estimate.at(num_done, num_steps, elapsed_s)


def _compile(
    folder: Path, native: Toolchain, progress: Callable[[str], None], report: Report
) -> None:
    build_cache.make_folder(folder)
    files = toolchain.compiled_files(source_dir(), native.cuda)
    compile_progress = _CompileProgress(folder, files, progress, report)
    with build_cache.locked(folder, compile_progress.wait) as lock_fd:
        if _is_done(folder):
            return
        if (folder / build_cache.MARK_NAME).exists():
            progress(f"the compiled files in {folder} are damaged: compiling them again")
            build_cache.clear(folder)
        compile_progress.begin()
        toolchain.compile_products(
            source_dir(),
            folder,
            native,
            progress=compile_progress.note,
            env=os.environ,
            pass_fds=(lock_fd,),
        )
        build_cache.mark_whole(folder, PRODUCTS)


def _load(folder: Path) -> ModuleType:
    """Load the products in `folder` and register their ops; returns the `_host` module.

    Raises BuildError.
    """
    try:
        torch.ops.load_library(folder / toolchain.OPS_PRODUCT)  # type: ignore[no-untyped-call]
        path = str(folder / toolchain.HOST_PRODUCT)
        loader = importlib.machinery.ExtensionFileLoader("_host", path)
        spec = importlib.util.spec_from_file_location("_host", path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (OSError, ImportError) as error:
        raise BuildError(f"the native ops in {folder} do not load: {error}") from error
    return module


# Ops that do not exist on a CPU: products by FP8 matrix units, switches of the CUDA dispatch for
# benchmarks, and ops between cards, whose twins take lists of tensors (reference_comm.py).
_OF_CARDS = (
    "linear_w8a8", "serves_linear_w8a8", "try_linear_w8a8", "try_linear_w4a16",
    "all_reduce_add_norm", "all_reduce_one_shot", "all_reduce_two_shot",
    "gather_rows", "broadcast_tokens",
)  # fmt: skip


def _register_reference() -> None:
    """Define the schemas of ops.cpp, and register the plain-torch twins as CPU implementations."""
    global _library
    _library = torch.library.Library("pyserve", "DEF")  # type: ignore[no-untyped-call]
    text = (source_dir() / "ops.cpp").read_text(encoding="utf-8")
    for match in re.finditer(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text):
        schema = "".join(re.findall(r'"([^"]*)"', match[1]))
        name = schema.split("(", 1)[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        if name not in _OF_CARDS:
            _library.impl(name, getattr(reference, name), "CPU")  # type: ignore[no-untyped-call]
