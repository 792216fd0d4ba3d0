"""Compiles grammars on threads with a large stack, within a time limit.

A compile cannot be stopped. If it exceeds its time, the request is answered with an error, but the
thread keeps running, and occupies a core, until the compile ends by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pyserve.allocator import trim
from pyserve.errors import InvalidRequestError, RequestError, UnavailableError, release_frames

MAX_COMPILE_S = 3.0  # CPU time of one compile
MIN_WAIT_S, MAX_WAIT_S = 0.02, 10.0  # how long to wait for that CPU time: a machine may be busy
MAX_LATE = 2  # compiles that may still be running after their time
LONG_S = 0.01  # a compile that takes more CPU time has freed memory worth giving back
STACK_BYTES = 512 * 2**20  # address space only; pages that are not touched take no memory

R = TypeVar("R")


class TooLongError(InvalidRequestError):
    """400: a grammar takes too long to compile."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param} takes longer than {MAX_COMPILE_S:g} s to compile", param)


class _Runner:
    """Runs each function on a new thread with a large stack, for a limited time."""

    def __init__(self) -> None:
        self._starting = threading.Lock()  # threading.stack_size is set for the whole process
        self._late: list[threading.Thread] = []

    def run(self, function: Callable[[], R], param: str) -> R:
        """The result of `function`, or the error that it raises.

        Raises TooLongError for `param` if it takes too long, and UnavailableError while MAX_LATE
        earlier calls are still running after their time.
        """
        results: list[R] = []
        errors: list[BaseException] = []
        clocks: list[int] = []  # id of the thread's CPU clock

        def call() -> None:
            clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
                if isinstance(error, RequestError):
                    release_frames(error)  # its frames hold what was compiled
            if time.thread_time() > LONG_S:
                trim()  # this thread's malloc arena may not be used again for long

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
            # Popped: a reference in this frame would be a cycle that keeps the result.
            raise errors.pop()
        return results[0]


def _worked_s(clocks: list[int]) -> float:
    """CPU time of a thread by its clock; 0 before it has started and once it has ended."""
    try:
        return time.clock_gettime(clocks[0])
    except (IndexError, OSError):
        return 0.0


run_bounded = _Runner().run
