"""Preload: maps torch's shared libraries and opens the GPU before `import torch`, without the GIL.

`import` and ctypes.CDLL hold the GIL while the dynamic linker maps and relocates a library: 0.15 to
0.3 s for libtorch_cpu.so and longer for the CUDA libraries. In that time the event loop could not
answer, nor a tokenizer be read. Calling dlopen as a foreign function releases the GIL. Afterwards
`import torch` finds the mapped libraries by their sonames, and the first CUDA call finds the card's
context. This file must not import torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

READ_AHEAD_BYTES = 2**17  # the kernel reads ahead no more than this for one request
# Opened in torch's own order and with its flags: first the global dependencies, then libtorch.
LIBRARIES = (
    ("libtorch_global_deps.so", os.RTLD_LAZY | os.RTLD_GLOBAL),
    ("libtorch.so", os.RTLD_LAZY),
)
READ_AHEAD = "libtorch_python.so"  # opening it needs the GIL; reading it into memory does not
DRIVER_LIBRARY = "libcuda.so.1"
CARD_GRACE_S = 5.0  # how long `end` waits for a driver that hangs


class Preload:
    """Preloads on two background threads, which the constructor starts.

    Errors are ignored: if torch or the card cannot be used, torch itself will say why.

    is_card_wanted  also create the CUDA context of the first card, the one that torch will use;
                    this takes the driver 0.2 s or more.
    """

    def __init__(self, *, is_card_wanted: bool) -> None:
        self._card: threading.Thread | None = None
        self._libraries = threading.Thread(
            target=self._run, args=(is_card_wanted,), name="preload", daemon=True
        )
        self._libraries.start()

    def wait(self) -> None:
        """Wait until torch's libraries are mapped, so that importing it holds the GIL briefly."""
        self._libraries.join()

    def end(self) -> None:
        """Wait for the threads. Called before the process ends: a library must not be unloaded
        while it initialises."""
        self.wait()
        if self._card is not None:
            self._card.join(CARD_GRACE_S)

    def _run(self, is_card_wanted: bool) -> None:
        # The dynamic linker opens one library at a time. The driver's library is small and comes
        # first, so that the card starts up while torch's libraries are being mapped.
        if is_card_wanted and (driver := _open_driver()) is not None:
            self._card = threading.Thread(target=_open_card, args=(driver,), daemon=True)
            self._card.start()
        preload_torch()


def preload_torch() -> None:
    """Map torch's libraries into the process. Never raises; `import torch` reports any failure."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "lib"
    _read_ahead(folder / READ_AHEAD)
    for name, flags in LIBRARIES:
        path = folder / name
        if path.is_file() and not _dlopen(os.fsencode(path), flags):
            return


def _dlopen(name: bytes, flags: int) -> int | None:
    """Call C's dlopen without holding the GIL; returns the handle, None on failure."""
    try:
        dlopen = ctypes.CDLL(None).dlopen
    except (OSError, AttributeError):
        return None
    dlopen.restype = ctypes.c_void_p
    dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
    handle: int | None = dlopen(name, flags)
    return handle


def _open_driver() -> Any:
    """The CUDA driver library; None where it is not installed."""
    handle = _dlopen(DRIVER_LIBRARY.encode(), os.RTLD_LAZY)
    return None if handle is None else ctypes.CDLL(DRIVER_LIBRARY, handle=handle)


def _open_card(driver: Any) -> None:
    """Create the first card's primary context, which the CUDA runtime will use, and keep it."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _read_ahead(path: Path) -> None:
    """Ask the kernel to read a file into the page cache, without waiting for it."""
    try:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, READ_AHEAD_BYTES):
                os.posix_fadvise(file.fileno(), start, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
