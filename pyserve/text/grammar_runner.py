"""Runs compiles of grammars on threads with a large stack, each for a limited time.

A compile cannot be stopped. One that goes on after its time keeps a core, and its thread, until it
ends by itself; the request that asked for it has been answered long before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pyserve.allocator import trim
from pyserve.errors import InvalidRequestError, RequestError, UnavailableError, release_frames

MAX_COMPILE_S = 3.0  # of work
MIN_WAIT_S, MAX_WAIT_S = 0.02, 10.0  # for it, on a busy machine
MAX_LATE = 2  # compiles that went on after their time
LONG_S = 0.01  # a compile of more work has built what is worth to give back
STACK_BYTES = 512 * 2**20  # of address space; what is not used is never there

R = TypeVar("R")


class TooLongError(InvalidRequestError):
    """400: a grammar takes too long to compile."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param} takes longer than {MAX_COMPILE_S:g} s to compile", param)


class _Runner:
    """Runs compiles on threads with a large stack, each for a limited time."""

    def __init__(self) -> None:
        self._starting = threading.Lock()  # the size of stacks is the whole process's
        self._late: list[threading.Thread] = []

    def run(self, function: Callable[[], R], param: str) -> R:
        results: list[R] = []
        errors: list[BaseException] = []
        clocks: list[int] = []  # of the thread's work

        def call() -> None:
            clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
                if isinstance(error, RequestError):
                    release_frames(error)  # they hold what was compiled
            if time.thread_time() > LONG_S:
                trim()  # the arena of this thread will serve none for long

        thread = threading.Thread(target=call, name="pyserve-grammar", daemon=True)
        with self._starting:
            self._late = [one for one in self._late if one.is_alive()]
            if len(self._late) >= MAX_LATE:
                raise UnavailableError("earlier grammars still compile, try again in a minute", 60)
            before = threading.stack_size(STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
        began_s, left_s = time.monotonic(), MAX_COMPILE_S
        while left_s > 0 and thread.is_alive() and time.monotonic() - began_s < MAX_WAIT_S:
            thread.join(max(left_s, MIN_WAIT_S))
            left_s = MAX_COMPILE_S - _worked_s(clocks)
        if thread.is_alive():
            with self._starting:
                self._late.append(thread)
            raise TooLongError(param)
        if errors:
            raise errors.pop()  # one that this frame held would hold this frame, and its results
        return results[0]


def _worked_s(clocks: list[int]) -> float:
    """What a thread has worked by its clock; 0 before it runs and once it has ended."""
    try:
        return time.clock_gettime(clocks[0])
    except (IndexError, OSError):
        return 0.0


run_bounded = _Runner().run
