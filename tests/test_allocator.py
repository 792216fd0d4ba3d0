"""What a thread has freed goes back to the system, the end of its arena too."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyserve import allocator

NUM_MIB = 40
PROGRAM = """
import ctypes, threading
from pyserve.allocator import {function}

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def work():
    # Once so much has been freed at once, glibc keeps twice as much in each arena.
    libc.free(libc.malloc(31 * 2**20))
    places = (ctypes.c_void_p * ({num_mib} * 256))()
    for i in range(len(places)):
        places[i] = libc.malloc(4000)  # more than the cache of a thread takes
        ctypes.memset(places[i], 1, 4000)
    for i in reversed(range(len(places))):
        libc.free(places[i])
    libc.malloc_trim(0)
    kept = resident_mib()
    {function}()
    print(kept - resident_mib())

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not allocator._is_glibc, reason="the C library is not glibc")
@pytest.mark.parametrize("function", ["give_back", "cut_end"])
def test_the_end_of_an_arena_goes_back(function: str) -> None:
    program = PROGRAM.format(function=function, num_mib=NUM_MIB)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.9 * NUM_MIB


@pytest.mark.skipif(not hasattr(allocator._libc, "mallinfo2"), reason="needs glibc 2.33")
def test_used_bytes_are_those_that_are_allocated() -> None:
    before = allocator.used_bytes()
    held = bytearray(2**27)
    assert 2**27 <= allocator.used_bytes() - before < 2**28
    del held
    assert allocator.used_bytes() - before < 2**26
