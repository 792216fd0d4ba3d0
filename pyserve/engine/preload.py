"""Map torch's libraries before `import torch`, without the GIL.

`import` and ctypes.CDLL hold the GIL while the dynamic linker maps and relocates: 0.15 to 0.3 s
for libtorch_cpu.so, more for CUDA's, in which the event loop could not answer. A foreign call does
not hold it. What is mapped here is found by `import torch` by its soname. No torch here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

READ_AHEAD_BYTES = 2**17  # the kernel takes no more of a file at a time
# As torch itself opens them: first what all may share, then all that libtorch needs.
LIBRARIES = (
    ("libtorch_global_deps.so", os.RTLD_LAZY | os.RTLD_GLOBAL),
    ("libtorch.so", os.RTLD_LAZY),
)
READ_AHEAD = "libtorch_python.so"  # opening it needs the GIL, reading it into memory does not


def preload_torch() -> None:
    """Never raises. Where torch cannot be loaded, `import torch` will tell why."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "lib"
    _read_ahead(folder / READ_AHEAD)
    try:
        dlopen = ctypes.CDLL(None).dlopen  # a foreign function: called without the GIL
    except (OSError, AttributeError):
        return
    dlopen.restype = ctypes.c_void_p
    dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
    for name, flags in LIBRARIES:
        path = folder / name
        if path.is_file() and not dlopen(os.fsencode(path), flags):
            return


def _read_ahead(path: Path) -> None:
    """Ask the kernel to read a file; it is not waited for."""
    try:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, READ_AHEAD_BYTES):
                os.posix_fadvise(file.fileno(), start, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
