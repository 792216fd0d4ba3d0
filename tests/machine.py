"""What tests of durations need to know of this machine and this process."""

from __future__ import annotations

import gc
import time

NUM_ADDITIONS = 200_000
ADDITION_S = 30e-9  # what one takes in a loop of CPython 3.11 on a fast server's core


def slowness() -> float:
    """How many times longer than on such a core Python's work takes here, at least 1.

    A core may be half as fast, or share its units with one that compiles: a limit in milliseconds
    would then hold the machine to account and not the code.
    """
    fastest_s = float("inf")
    for _ in range(3):
        began_s, total = time.thread_time(), 0
        for number in range(NUM_ADDITIONS):
            total += number
        fastest_s = min(fastest_s, time.thread_time() - began_s)
    return max(1.0, fastest_s / (NUM_ADDITIONS * ADDITION_S))


def freeze() -> None:
    """Let the garbage collector pass over all objects that there are already.

    A server freezes what it has loaded. A process of tests holds millions of objects of other tests
    as well, and a collection that looks at them takes longer than what is measured.
    """
    gc.collect()
    gc.freeze()
