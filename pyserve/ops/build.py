"""Finds or compiles the native products and loads them; else registers their plain-torch twins.

Found in this order: in the package, where setup.py put them; in the cache folder, in a folder named
by the hash of everything they depend on; compiled into it, once, for exactly this machine
(build_cache.py tells what of a cache may be loaded). Asked for CUDA, all three hold the CUDA ops
too.
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
MANIFEST_NAME = "native.json"  # beside products that setup.py built
_CPU_REMEDY = "or pass --allow-reference-ops to serve slowly without"
_CUDA_REMEDY = "or pass --device cpu"

Report = Callable[[int, int], None]  # done, total

_lock = threading.Lock()
_mode: Mode | None = None
_host: Any = None
_has_cuda = False
_library: torch.library.Library | None = None  # keeps the twins registered


def report_nothing(done: int, total: int) -> None:
    """For who does not want to hear."""


def load_native(
    *,
    is_reference_allowed: bool,
    progress: Callable[[str], None],
    device: DeviceKind = "cpu",
    report: Report = report_nothing,
) -> Mode:
    """Make torch.ops.pyserve and `host()` usable. Harmless when called again, from any thread.

    Ops for the CPU are always there, those of the current CUDA card where `device` is cuda: the
    first call decides. progress gets lines for a user, report (done, total) of a compile, in parts
    of its time. The twins, where is_reference_allowed, serve on a CPU only. Raises StartupError
    where the card cannot be used, BuildError where nothing can be found or compiled.
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
    """The `_host` module, or its twin."""
    assert _mode is not None, "load_native has not run"
    return _host


def source_dir() -> Path:
    """Folder of the C++ sources: in an installed package, else in the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "cuda"


@dataclass(frozen=True)
class CudaCard:
    """What the CUDA ops must fit; versions as (9, 0)."""

    capability: tuple[int, int]
    driver: tuple[int, int]  # the newest CUDA that its driver supports


def _current_card() -> CudaCard:
    cuda_card.check_cuda()
    index = torch.cuda.current_device()
    return CudaCard(cuda_card.capability(index), cuda_card.driver_version())


@contextmanager
def _products(
    progress: Callable[[str], None], card: CudaCard | None = None, report: Report = report_nothing
) -> Iterator[Path]:
    """Folder that holds both products; with the CUDA ops where a card is given."""
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
    """`folder` with whole products in it, or one for this process alone where it is not ours."""
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
    """The CUDA compiler for a card; where there is none, the error says how to get one."""
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
    except RuntimeError as error:  # of Path.home()
        raise BuildError("no home folder: set PYSERVE_CACHE to a writable one") from error


def _why_unfit(packaged: Path, card: CudaCard | None) -> str | None:
    """None where the package holds products of these sources that this machine can run.

    Else the reason, in a user's words; empty where the package holds none of these sources.
    """
    try:
        manifest = json.loads((packaged / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    cuda = manifest.get("cuda")  # earlier versions wrote none
    sources = toolchain.source_hash(source_dir(), has_cuda=cuda is not None)
    if manifest["sources"] != sources or manifest["soabi"] != sysconfig.get_config_var("SOABI"):
        return ""
    for name, size in manifest.get("sizes", {}).items():  # earlier versions wrote none
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
    """True where code for `archs` runs on a card; is_ptx_readable: its driver can read the PTX."""
    for arch in archs:
        number, _, ptx = arch.partition("-")
        major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if number[-1] in "af":  # for one card only
            if not ptx and (major, minor) == capability:
                return True
        elif ptx:
            if is_ptx_readable and (major, minor) <= capability:
                return True
        elif major == capability[0] and minor <= capability[1]:
            return True
    return False


def _key(native: Toolchain) -> str:
    """Hash of all that decides whether compiled products fit: sources, flags, torch, machine.

    Where headers lie is left out: every environment with the same torch shares the products.
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
    """Tells of a compile, in a line at its beginning and in figures: of ours or of another's."""

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
        self._first = 0  # what another process had done when this one began to wait

    def begin(self) -> None:
        """This process compiles from now on."""
        self._began_s = time.monotonic()
        self._progress(f"compiling {self._num_files} files for this machine, once ...")
        self.note(0, 0)

    def note(self, num_done: int, num_steps: int) -> None:
        """So much is done; both are 0 until the first step has ended."""
        self._report(*self._at(num_done, num_steps, time.monotonic() - self._began_s))

    def wait(self) -> None:
        """Another process compiles: look at the files it writes. Called again and again."""
        try:
            began_s = (self._folder / toolchain.NINJA_FILE).stat().st_mtime
            log = (self._folder / toolchain.LOG_NAME).read_bytes()
        except OSError:  # it has only begun
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
    """Register the ops of folder's products; returns the `_host` module."""
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


# What has no meaning on a CPU: products by a card's units for 8 bits, switches of its dispatch, and
# work between cards, whose twins are over lists (reference_comm.py).
_OF_CARDS = (
    "linear_w8a8", "serves_linear_w8a8", "try_linear_w8a8", "try_linear_w4a16",
    "all_reduce_add_norm", "all_reduce_one_shot", "all_reduce_two_shot",
    "gather_rows", "broadcast_tokens",
)  # fmt: skip


def _register_reference() -> None:
    """Define the schemas of ops.cpp with the twins as their CPU implementation."""
    global _library
    _library = torch.library.Library("pyserve", "DEF")  # type: ignore[no-untyped-call]
    text = (source_dir() / "ops.cpp").read_text(encoding="utf-8")
    for match in re.finditer(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text):
        schema = "".join(re.findall(r'"([^"]*)"', match[1]))
        name = schema.split("(", 1)[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        if name not in _OF_CARDS:
            _library.impl(name, getattr(reference, name), "CPU")  # type: ignore[no-untyped-call]
