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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from pyserve import config
from pyserve.errors import BuildError
from pyserve.ops import build_cache, fakes, reference, toolchain
from pyserve.ops import device as card_device
from pyserve.ops.toolchain import CompileError, CudaCompiler, NoCudaCompilerError, Toolchain

Mode = Literal["native", "reference"]
Device = Literal["cpu", "cuda"]
PRODUCTS = (toolchain.OPS_PRODUCT, toolchain.HOST_PRODUCT)
MANIFEST_NAME = "native.json"  # beside products that setup.py built
_CPU_REMEDY = "or pass --allow-reference-ops to serve slowly without"
_CUDA_REMEDY = "or pass --device cpu"

_lock = threading.Lock()
_mode: Mode | None = None
_host: Any = None
_has_cuda = False
_library: torch.library.Library | None = None  # keeps the twins registered


def load_native(
    *, allow_reference: bool, progress: Callable[[str], None], device: Device = "cpu"
) -> Mode:
    """Make torch.ops.pyserve and `host()` usable. Harmless when called again, from any thread.

    Ops for the CPU are always there, those of the current CUDA card where `device` is cuda: the
    first call decides. progress gets lines for a user. The twins of allow_reference serve on a CPU
    only. Raises StartupError where the card cannot be used, BuildError where nothing can be found
    or compiled.
    """
    global _mode, _host, _has_cuda
    with _lock:
        if _mode is None:
            card = _current_card() if device == "cuda" else None
            try:
                with _products(progress, card) as folder:
                    _host = _load(folder)
                _mode = "native"
            except BuildError as error:
                if card is not None or not allow_reference:
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
class Card:
    """What the CUDA ops must fit; versions as (9, 0)."""

    capability: tuple[int, int]
    driver: tuple[int, int]  # the newest CUDA that its driver supports


def _current_card() -> Card:
    card_device.check_cuda()
    index = torch.cuda.current_device()
    return Card(card_device.capability(index), card_device.driver_version())


@contextmanager
def _products(progress: Callable[[str], None], card: Card | None = None) -> Iterator[Path]:
    """Folder that holds both products; with the CUDA ops where a card is given."""
    sanitize = config.env("PYSERVE_SANITIZE") is not None
    packaged = Path(__file__).resolve().parent
    unfit = "" if sanitize else _why_unfit(packaged, card)
    if not sanitize and unfit is None:
        yield packaged
        return
    try:
        native = toolchain.find_toolchain(config.env("CXX"), march="native", sanitize=sanitize)
        if card is not None:
            native = replace(native, cuda=_find_cuda_compiler(card))
        yield from _cached(_cache_dir() / "native" / _key(native), native, progress)
    except CompileError as error:
        reason = f"{unfit}; {error}" if unfit else str(error)
        raise BuildError(reason) from error
    except OSError as error:
        raise BuildError(
            f"cannot keep compiled files in {_cache_dir()} ({error.strerror}): "
            "set PYSERVE_CACHE to a writable folder that nobody else can write to"
        ) from error


def _cached(folder: Path, native: Toolchain, progress: Callable[[str], None]) -> Iterator[Path]:
    """`folder` with whole products in it, or one for this process alone where it is not ours."""
    reason = build_cache.untrusted_reason(folder)
    if reason is not None:
        progress(
            f"{reason}: compiling for this start alone; set PYSERVE_CACHE to a folder that nobody "
            "else can write to, and it is done once"
        )
        with build_cache.temporary_folder() as alone:
            _compile(alone, native, progress)
            yield alone
        return
    if not _is_done(folder):
        _compile(folder, native, progress)
    yield folder


def _find_cuda_compiler(card: Card) -> CudaCompiler:
    """The CUDA compiler for a card; where there is none, the error says how to get one."""
    try:
        return toolchain.find_cuda_compiler(
            os.environ, capability=card.capability, driver=card.driver
        )
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


def _why_unfit(packaged: Path, card: Card | None) -> str | None:
    """None where the package holds products of these sources that this machine can run.

    Else the reason, in a user's words; empty where the package holds none of these sources.
    """
    try:
        manifest = json.loads((packaged / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    cuda = manifest.get("cuda")  # earlier versions wrote none
    sources = toolchain.source_hash(source_dir(), with_cuda=cuda is not None)
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
    wanted = config.env(toolchain.ARCHS_VARIABLE)
    if wanted is not None and wanted != ",".join(archs):
        return f"the packaged CUDA ops ({', '.join(archs)}) are not {toolchain.ARCHS_VARIABLE}"
    if version[0] > card.driver[0]:
        return f"the packaged CUDA ops need a driver for CUDA {version[0]}"
    if not toolchain.covers(archs, card.capability, can_translate=version <= card.driver):
        number = f"{card.capability[0]}.{card.capability[1]}"
        return f"the packaged CUDA ops ({', '.join(archs)}) are not for compute capability {number}"
    return None


def _key(native: Toolchain) -> str:
    """Hash of all that decides whether compiled products fit: sources, flags, torch, machine.

    Where headers lie is left out: every environment with the same torch shares the products.
    """
    cuda = native.cuda
    parts = (
        toolchain.source_hash(source_dir(), with_cuda=cuda is not None),
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


def _compile(folder: Path, native: Toolchain, progress: Callable[[str], None]) -> None:
    build_cache.make_folder(folder)
    waiting = "waiting for another process that compiles the native ops ..."
    with build_cache.locked(folder, lambda: progress(waiting)) as lock_fd:
        if _is_done(folder):
            return
        if (folder / build_cache.MARK_NAME).exists():
            progress(f"the compiled files in {folder} are damaged: compiling them again")
            build_cache.clear(folder)
        files = toolchain.source_files(source_dir(), with_cuda=native.cuda is not None)
        num_sources = sum(path.suffix in (".cpp", ".cu") for path in files)
        progress(f"compiling {num_sources} files for this machine, once ...")
        toolchain.compile_products(
            source_dir(),
            folder,
            native,
            progress=lambda done, total: progress(f"compiling: {done} of {total} steps done"),
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


def _register_reference() -> None:
    """Define the schemas of ops.cpp with the twins as their CPU implementation."""
    global _library
    _library = torch.library.Library("pyserve", "DEF")  # type: ignore[no-untyped-call]
    text = (source_dir() / "ops.cpp").read_text(encoding="utf-8")
    for match in re.finditer(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text):
        schema = "".join(re.findall(r'"([^"]*)"', match[1]))
        name = schema.split("(", 1)[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(name, getattr(reference, name), "CPU")  # type: ignore[no-untyped-call]
