"""Gives back to the system what long text work has freed, and tells what is allocated.

glibc keeps what a thread has freed in an arena of that thread. malloc_trim returns the pages within
an arena, but the free end of an arena only in the main one: in the others up to 64 MB each stayed,
more or less of it after each long text. The end is cut when something large is freed next to it,
down to a threshold that glibc moves by itself; here it is lowered for a moment.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h
CUT_BYTES: Final = 2**17
# Once one is set, glibc moves neither: these are where it moves them in a server under load. Lower
# ones would have the tensors of each step on a CPU come from the system and go back to it.
KEEP_BYTES: Final = 2**26
MMAP_BYTES: Final = 2**25

_libc = ctypes.CDLL(None)
_is_glibc = hasattr(_libc, "gnu_get_libc_version")
_lock = threading.Lock()  # of the threshold


class _Info(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


if hasattr(_libc, "mallinfo2"):
    _libc.mallinfo2.restype = _Info
if _is_glibc:
    _libc.malloc.argtypes, _libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    _libc.free.argtypes, _libc.free.restype = [ctypes.c_void_p], None


def give_back() -> None:
    """Return what is free in all arenas, and the end of that of this thread. Takes milliseconds to
    tens of them, without the interpreter's lock. Does nothing with another C library.
    """
    _cut_end(is_all_trimmed=True)


def cut_end() -> None:
    """Return the free end of the arena of this thread; takes next to nothing where it is small."""
    _cut_end(is_all_trimmed=False)


def _cut_end(*, is_all_trimmed: bool) -> None:
    if not _is_glibc:
        return
    with _lock:
        _libc.mallopt(TRIM_THRESHOLD, CUT_BYTES)
        _libc.free(_libc.malloc(CUT_BYTES))
        if is_all_trimmed:
            _libc.malloc_trim(0)
        _libc.mallopt(TRIM_THRESHOLD, KEEP_BYTES)
        _libc.mallopt(MMAP_THRESHOLD, MMAP_BYTES)


def used_bytes() -> int:
    """What the process has allocated and not freed; 0 with a C library that does not tell."""
    if not hasattr(_libc, "mallinfo2"):
        return 0
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)
