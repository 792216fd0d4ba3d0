"""Text work on threads: templates, tokenising, large bodies. Bounded, and shared between clients.

There are two lanes, for short work and for long work, and no lane gets all threads: short work
passes long work and does not starve it. A step wants cores too: on two there is one long work at a
time. Within a lane the clients take turns, however much each has queued. A connection answers one
request at a time, so it has one piece of work here. A client may queue no more than it leaves free:
half of the queue if it is alone, so that another finds room.

Everything here but the work itself runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pyserve import host
from pyserve.allocator import trim
from pyserve.errors import QueueFullError

NUM_THREADS = 3
MAX_IN_LANE = 2  # of them
MAX_SHORT_BYTES = 2**16  # tens of milliseconds
MAX_WAITING = 4096  # pieces of work, those under way too
MAX_WAITING_BYTES = 2**27  # of the bodies they are about
TRIM_BYTES = 2**18  # work on so much leaves tens of megabytes to the allocator

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Work:
    client: str
    num_bytes: int
    function: Callable[[], Any]
    result: asyncio.Future[Any]
    has_begun: bool = False


class _Lane:
    """Work that waits, by client; the first of the clients is the next one served."""

    def __init__(self, max_running: int) -> None:
        self.num_running = 0
        self._max_running = max_running
        self._waiting: dict[str, deque[_Work]] = {}

    @property
    def is_ready(self) -> bool:
        return bool(self._waiting) and self.num_running < self._max_running

    def add(self, work: _Work) -> None:
        self._waiting.setdefault(work.client, deque()).append(work)

    def remove(self, work: _Work) -> None:
        own = self._waiting[work.client]
        own.remove(work)
        if not own:
            del self._waiting[work.client]

    def take(self) -> _Work:
        """The next one; its client goes to the end of the line."""
        client, own = next(iter(self._waiting.items()))
        work = own.popleft()
        del self._waiting[client]
        if own:
            self._waiting[client] = own
        return work


class TextQueue:
    """The threads and what waits for them. `close` must be called.

    num_cores  that there are; None: those of this machine.
    """

    def __init__(self, num_cores: int | None = None) -> None:
        # Two long texts at once took a step's cores and the interpreter's lock from it: of streams
        # beside them the longest gap was 0.25 to 1.3 s on two cores, beside one 0.15 to 0.23.
        num_long = max(1, min(MAX_IN_LANE, (num_cores or host.num_cores()) - 1))
        self._threads = ThreadPoolExecutor(NUM_THREADS, "pyserve-text")
        self._short, self._long = _Lane(MAX_IN_LANE), _Lane(num_long)
        self._num_held, self._num_bytes_held = 0, 0
        self._held: dict[str, tuple[int, int]] = {}  # client -> pieces of work and their bytes

    async def run(
        self, function: Callable[[], R], *, client: str, num_bytes: int, is_answer: bool = False
    ) -> R:
        """The result of `function`, called on a thread when it is its turn.

        num_bytes  that it is about: of the body, or of the text.
        is_answer  it ends a request: it is never refused, as more has been spent on it.

        Raises QueueFullError where too much waits, and what `function` raises.
        """
        if not is_answer:
            self._check_room(client, num_bytes)
        lane = self._lane(num_bytes)
        future = asyncio.get_running_loop().create_future()
        work = _Work(client, num_bytes, function, future)
        self._hold(work, 1)
        lane.add(work)
        self._begin()
        try:
            result: R = await work.result
            return result
        finally:
            if not work.has_begun:  # the client has gone
                lane.remove(work)
                self._hold(work, -1)

    def close(self) -> None:
        """Let go of the threads; what they still do is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _lane(self, num_bytes: int) -> _Lane:
        return self._short if num_bytes <= MAX_SHORT_BYTES else self._long

    def _check_room(self, client: str, num_bytes: int) -> None:
        num_own, num_own_bytes = self._held.get(client, (0, 0))
        num_free = MAX_WAITING - self._num_held
        num_free_bytes = MAX_WAITING_BYTES - self._num_bytes_held
        if num_own < num_free and num_own_bytes + num_bytes <= num_free_bytes:
            return
        raise QueueFullError(
            f"{num_own} requests of yours with {num_own_bytes} bytes of text wait to be read, of "
            f"{self._num_held} with {self._num_bytes_held} in all; try again in 1 s"
        )

    def _hold(self, work: _Work, count: int) -> None:
        """Account for `work`: count 1 when it comes, -1 when it has ended."""
        num_own, num_own_bytes = self._held.get(work.client, (0, 0))
        num_bytes = count * work.num_bytes
        self._num_held += count
        self._num_bytes_held += num_bytes
        self._held[work.client] = (num_own + count, num_own_bytes + num_bytes)
        if not num_own + count:
            del self._held[work.client]

    def _begin(self) -> None:
        """Give the threads that are free something to do."""
        loop = asyncio.get_running_loop()
        while self._short.num_running + self._long.num_running < NUM_THREADS:
            lane = self._short if self._short.is_ready else self._long
            if not lane.is_ready:
                return
            work = lane.take()
            work.has_begun = True
            lane.num_running += 1
            call = _trimmed(work.function, work.num_bytes)

            def on_end(future: Future[Any], work: _Work = work) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._end, work, future)

            self._threads.submit(call).add_done_callback(on_end)

    def _end(self, work: _Work, future: Future[Any]) -> None:
        self._lane(work.num_bytes).num_running -= 1
        self._hold(work, -1)
        if not work.result.done():  # its client may have gone
            if future.cancelled():
                work.result.cancel()
            elif (error := future.exception()) is not None:
                work.result.set_exception(error)
            else:
                work.result.set_result(future.result())
        if not future.cancelled():  # only the queue's end cancels it
            self._begin()


def _trimmed(function: Callable[[], R], num_bytes: int) -> Callable[[], R]:
    """`function`, and then what long work has freed goes back to the system."""
    if num_bytes < TRIM_BYTES:
        return function

    def call() -> R:
        try:
            return function()
        finally:
            trim()

    return call
