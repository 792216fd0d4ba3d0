"""Finds or compiles the native products and loads them; else registers their plain-torch twins.

Found in this order: in the package, where setup.py put them; in the cache folder, in a folder named
by the hash of everything they depend on; compiled into it, once, for exactly this machine, under a
file lock that dies with its owner.
"""

from __future__ import annotations

import fcntl
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
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from pyserve import config
from pyserve.errors import BuildError
from pyserve.ops import fakes, reference, toolchain
from pyserve.ops.toolchain import CompileError, Toolchain

Mode = Literal["native", "reference"]
MANIFEST_NAME = "native.json"  # beside products that setup.py built
_REMEDY = "or pass --allow-reference-ops to serve slowly without"

_lock = threading.Lock()
_mode: Mode | None = None
_host: Any = None
_library: torch.library.Library | None = None  # keeps the twins registered


def load_native(*, allow_reference: bool, progress: Callable[[str], None]) -> Mode:
    """Make torch.ops.pyserve and `host()` usable. Harmless when called again, from any thread.

    progress gets lines for a user. Raises BuildError where nothing can be found or compiled and
    allow_reference is False.
    """
    global _mode, _host
    with _lock:
        if _mode is None:
            try:
                _host = _load(_find_or_compile(progress))
                _mode = "native"
            except BuildError as error:
                if not allow_reference:
                    raise
                reason = str(error).removesuffix(f"; {_REMEDY}")
                progress(f"{reason}; serving with the plain-torch ops: this is slow")
                _register_reference()
                _host = reference
                _mode = "reference"
            fakes.register_fakes()
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


def _find_or_compile(progress: Callable[[str], None]) -> Path:
    """Folder that holds both products."""
    sanitize = config.env("PYSERVE_SANITIZE") is not None
    packaged = Path(__file__).resolve().parent
    if not sanitize and _is_usable(packaged):
        return packaged
    try:
        native = toolchain.find_toolchain(config.env("CXX"), march="native", sanitize=sanitize)
        folder = _cache_dir() / "native" / _key(native)
        if not _is_done(folder):
            _compile(folder, native, progress)
    except CompileError as error:
        raise BuildError(f"{error}; {_REMEDY}") from error
    except OSError as error:
        raise BuildError(
            f"cannot keep compiled files in {_cache_dir()} ({error.strerror}): "
            f"set PYSERVE_CACHE to a writable folder; {_REMEDY}"
        ) from error
    return folder


def _cache_dir() -> Path:
    try:
        return config.cache_dir()
    except RuntimeError as error:  # of Path.home()
        raise BuildError(
            f"no home folder: set PYSERVE_CACHE to a writable one; {_REMEDY}"
        ) from error


def _is_usable(packaged: Path) -> bool:
    """True where the package holds products of these sources that this machine can run."""
    try:
        manifest = json.loads((packaged / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if manifest["soabi"] != sysconfig.get_config_var("SOABI"):
        return False
    if manifest["sources"] != toolchain.source_hash(source_dir()):
        return False
    if manifest["march"] != toolchain.PORTABLE_X86:
        return True
    return toolchain.PORTABLE_X86_FLAGS <= set(toolchain.cpu_identity().split())


def _key(native: Toolchain) -> str:
    """Hash of all that decides whether compiled products fit: sources, flags, torch, machine.

    Where headers lie is left out: every environment with the same torch shares the products.
    """
    parts = (
        toolchain.source_hash(source_dir()),
        native.compiler,
        native.version(),
        *native.flags(),
        *native.link_flags(),
        toolchain.TORCH_TARGET,
        torch.__version__,
        str(sysconfig.get_config_var("SOABI")),
        toolchain.cpu_identity(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _is_done(folder: Path) -> bool:
    return (folder / "done").is_file()


def _compile(folder: Path, native: Toolchain, progress: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    waiting = "waiting for another process that compiles the native ops ..."
    with _file_lock(folder / "lock", lambda: progress(waiting)) as lock_fd:
        if _is_done(folder):
            return
        num_sources = sum(path.suffix == ".cpp" for path in toolchain.source_files(source_dir()))
        progress(f"compiling {num_sources} files for this machine, once ...")
        toolchain.compile_products(
            source_dir(),
            folder,
            native,
            progress=lambda done, total: progress(f"compiling: {done} of {total} steps done"),
            env=os.environ,
            pass_fds=(lock_fd,),
        )
        (folder / "done").touch()


@contextmanager
def _file_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Exclusive among processes; gives the file descriptor that holds it.

    The kernel releases it when its owner and all who inherited the descriptor have died: a compiler
    that outlives a killed owner does not write beside the next one's.
    """
    with path.open("w") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield lock_file.fileno()


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
        raise BuildError(f"the native ops in {folder} do not load: {error}; {_REMEDY}") from error
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
