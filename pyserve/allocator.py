"""Settings of glibc's malloc, so that freed memory returns to the system, and its statistics.

By default glibc adapts two thresholds to what a process frees. Once a block of 32 MB has been
freed, all smaller blocks come from per-thread arenas, and each arena keeps up to 64 MB of free
memory at its end. Every long text could leave that much. So `fix_thresholds` fixes both thresholds
before anything large is freed. `trim` returns free pages that lie between used memory.
"""

from __future__ import annotations

import ctypes
from typing import Final

MAX_FAST, TRIM_THRESHOLD, MMAP_THRESHOLD = 1, -1, -3  # mallopt's parameters, from malloc.h
# Both thresholds: how much free memory an arena keeps at its end, and the size from which on a
# block is mapped from the system instead of taken from an arena. With a quarter of this, steps on
# a CPU would map and unmap memory all the time.
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
    """Fix the thresholds of malloc; called once at the start. Does nothing without glibc."""
    if _is_glibc:
        _libc.mallopt(MAX_FAST, 0)
        _libc.mallopt(TRIM_THRESHOLD, KEEP_BYTES)
        _libc.mallopt(MMAP_THRESHOLD, KEEP_BYTES)


def trim() -> None:
    """Return the free pages of all arenas to the system. Does nothing without glibc.

    Takes milliseconds to tens of milliseconds. It releases the GIL, but locks one arena after the
    other.
    """
    if _is_glibc:
        _libc.malloc_trim(0)


def used_bytes() -> int:
    """Bytes that the process has allocated and not freed; 0 where the C library cannot tell."""
    if not hasattr(_libc, "mallinfo2"):
        return 0
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)
