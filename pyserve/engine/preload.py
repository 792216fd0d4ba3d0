"""What torch needs of the system, got before `import torch` and without the GIL.

`import` and ctypes.CDLL hold the GIL while the dynamic linker maps and relocates: 0.15 to 0.3 s
for libtorch_cpu.so, more for CUDA's, in which neither the event loop could answer nor a tokenizer
be read. A foreign call does not hold it. What is mapped here is found by `import torch` by its
soname, and the card's context by the first call of CUDA. No torch here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

READ_AHEAD_BYTES = 2**17  # the kernel takes no more of a file at a time
# As torch itself opens them: first what all may share, then all that libtorch needs.
LIBRARIES = (
    ("libtorch_global_deps.so", os.RTLD_LAZY | os.RTLD_GLOBAL),
    ("libtorch.so", os.RTLD_LAZY),
)
READ_AHEAD = "libtorch_python.so"  # opening it needs the GIL, reading it into memory does not
DRIVER_LIBRARY = "libcuda.so.1"
CARD_GRACE_S = 5.0  # for a driver that hangs: the process may end without it


class Preload:
    """Runs on two threads from its making on. Nothing of it can fail: where torch or the card
    cannot be used, torch will tell why.

    is_card_wanted  make the CUDA context of the first card as well, the one that torch will use,
                    which takes the driver 0.2 s and more.
    """

    def __init__(self, *, is_card_wanted: bool) -> None:
        self._card: threading.Thread | None = None
        self._libraries = threading.Thread(
            target=self._run, args=(is_card_wanted,), name="preload", daemon=True
        )
        self._libraries.start()

    def wait(self) -> None:
        """Until torch can be imported without holding the GIL for long."""
        self._libraries.join()

    def end(self) -> None:
        """Before the process may end: a library must not be taken down while it is coming up."""
        self.wait()
        if self._card is not None:
            self._card.join(CARD_GRACE_S)

    def _run(self, is_card_wanted: bool) -> None:
        # The linker opens one library at a time: the driver's first, which takes a moment, so that
        # it starts the card while torch's are being mapped.
        if is_card_wanted and (driver := _open_driver()) is not None:
            self._card = threading.Thread(target=_open_card, args=(driver,), daemon=True)
            self._card.start()
        preload_torch()


def preload_torch() -> None:
    """Never raises. Where torch cannot be loaded, `import torch` will tell why."""
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
    """As the C function, called without the GIL."""
    try:
        dlopen = ctypes.CDLL(None).dlopen
    except (OSError, AttributeError):
        return None
    dlopen.restype = ctypes.c_void_p
    dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
    handle: int | None = dlopen(name, flags)
    return handle


def _open_driver() -> Any:
    """NVIDIA's driver; None where there is none."""
    handle = _dlopen(DRIVER_LIBRARY.encode(), os.RTLD_LAZY)
    return None if handle is None else ctypes.CDLL(DRIVER_LIBRARY, handle=handle)


def _open_card(driver: Any) -> None:
    """Retain the first card's primary context, the one of CUDA's runtime, for good."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _read_ahead(path: Path) -> None:
    """Ask the kernel to read a file; it is not waited for."""
    try:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, READ_AHEAD_BYTES):
                os.posix_fadvise(file.fileno(), start, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
