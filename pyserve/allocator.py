"""Has the system's allocator give back what was freed, and tells what is allocated.

glibc keeps what a thread has freed in an arena of that thread, and moves by itself what it keeps:
once a block of 32 MB was freed, all smaller ones lie in the arenas, and the free end of each arena
stays up to 64 MB, more or less of it behind each long text. So both are fixed here, before anything
large is freed. What lies free between things that are held, in pages, goes back by `trim`.
"""

from __future__ import annotations

import ctypes
from typing import Final

MAX_FAST, TRIM_THRESHOLD, MMAP_THRESHOLD = 1, -1, -3  # of mallopt, from malloc.h
# That an arena may keep at its end, and from which on a block is not taken from an arena but from
# the system. At a quarter of it steps on a CPU would take memory from the system and give it back.
KEEP_BYTES: Final = 2**20

_libc = ctypes.CDLL(None)
_is_glibc = hasattr(_libc, "gnu_get_libc_version")


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


def fix_thresholds() -> None:
    """To be called once, at the start. Does nothing with another C library, as `trim` does."""
    if _is_glibc:
        _libc.mallopt(MAX_FAST, 0)
        _libc.mallopt(TRIM_THRESHOLD, KEEP_BYTES)
        _libc.mallopt(MMAP_THRESHOLD, KEEP_BYTES)


def trim() -> None:
    """Return the free pages within all arenas. Takes milliseconds to tens of them, without the
    interpreter's lock, and holds one arena after another while it does.
    """
    if _is_glibc:
        _libc.malloc_trim(0)


def used_bytes() -> int:
    """What the process has allocated and not freed; 0 with a C library that does not tell."""
    if not hasattr(_libc, "mallinfo2"):
        return 0
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)
