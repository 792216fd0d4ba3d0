"""What has been freed goes back to the system, from whichever arena and whatever is held beside."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyserve import allocator

NUM_MIB = 40
PROGRAM = """
import ctypes, threading
from pyserve.allocator import KEEP_BYTES, fix_thresholds, trim

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def make(num_bytes, count):
    places = [libc.malloc(num_bytes) for _ in range(count)]
    for place in places:
        ctypes.memset(place, 1, num_bytes)
    return places

def work():
    libc.free(libc.malloc(31 * 2**20))  # glibc would keep twice as much in each arena from now on
    kept = []
    before = resident_mib()
    {work}
    print(resident_mib() - before)

fix_thresholds()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
# Pieces of 4,000 bytes are more than the cache of a thread takes.
AT_THE_END = "for place in reversed(make(4000, {num_mib} * 256)): libc.free(place)"
BETWEEN = """
    for i, place in enumerate(make(4000, {num_mib} * 256)):
        kept.append(place) if i % 64 == 0 else libc.free(place)
    trim()
"""
LARGE = "for place in make(KEEP_BYTES, {num_mib}): libc.free(place)"


@pytest.mark.skipif(not allocator._is_glibc, reason="the C library is not glibc")
@pytest.mark.parametrize("work", [AT_THE_END, BETWEEN, LARGE], ids=["end", "between", "large"])
def test_what_is_freed_goes_back(work: str) -> None:
    program = PROGRAM.format(work=work.format(num_mib=NUM_MIB))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1 * NUM_MIB


@pytest.mark.skipif(not hasattr(allocator._libc, "mallinfo2"), reason="needs glibc 2.33")
def test_used_bytes_are_those_that_are_allocated() -> None:
    before = allocator.used_bytes()
    held = bytearray(2**27)
    assert 2**27 <= allocator.used_bytes() - before < 2**28
    del held
    assert allocator.used_bytes() - before < 2**26
