"""TextQueue: runs text work on threads, such as templates, tokenising and decoding large bodies.

Short work and long work have a lane each, and neither lane may use all threads. So short work
overtakes long work, and does not starve it. Engine steps need cores too, so on two cores only one
piece of long work runs at a time. Within a lane the clients take turns, however much each has
queued. A connection answers one request at a time, so it has at most one piece of work here. A
client may not hold more of the queue than is left free; so a client alone gets half of it, and
another one still finds room.

Everything but the work itself runs on the event loop.
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
MAX_IN_LANE = 2  # threads that one lane may use
MAX_SHORT_BYTES = 2**16  # work on up to so much text is short: it takes tens of milliseconds
MAX_WAITING = 4096  # pieces of work that wait or run
MAX_WAITING_BYTES = 2**27  # bytes of text that they are about
TRIM_BYTES = 2**18  # work on so much text leaves tens of megabytes free in the allocator

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Work:
    client: str
    num_bytes: int
    function: Callable[[], Any]
    result: asyncio.Future[Any]
    has_begun: bool = False


class _Lane:
    """The waiting work of one lane, by client; the first client in the dict is served next."""

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
        """Take the next piece of work, and move its client to the end of the line."""
        client, own = next(iter(self._waiting.items()))
        work = own.popleft()
        del self._waiting[client]
        if own:
            self._waiting[client] = own
        return work


class TextQueue:
    """The threads and the work that waits for them. `close` must be called.

    num_cores  number of cores to assume; None: those of this machine.
    """

    def __init__(self, num_cores: int | None = None) -> None:
        # Two long texts at once take cores and the GIL from the engine's steps. Measured on two
        # cores, the longest gap in concurrent streams was 0.25 to 1.3 s with two long texts at a
        # time, and 0.15 to 0.23 s with one.
        num_long = max(1, min(MAX_IN_LANE, (num_cores or host.num_cores()) - 1))
        self._threads = ThreadPoolExecutor(NUM_THREADS, "pyserve-text")
        self._short, self._long = _Lane(MAX_IN_LANE), _Lane(num_long)
        self._num_held, self._num_bytes_held = 0, 0
        self._held: dict[str, tuple[int, int]] = {}  # client -> pieces of work and their bytes

    async def run(
        self, function: Callable[[], R], *, client: str, num_bytes: int, is_answer: bool = False
    ) -> R:
        """Call `function` on a thread when its turn comes; returns its result.

        client     the client whose turn it takes.
        num_bytes  size of the body or the text that it is about.
        is_answer  it is the last work of a request. It is never refused, because most of the cost
                   of the request has been spent already.

        Raises QueueFullError where too much work waits, and what `function` raises.
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
            if not work.has_begun:  # cancelled while it waited, as its client has gone
                lane.remove(work)
                self._hold(work, -1)

    def close(self) -> None:
        """Drop waiting work and release the threads, without waiting for what they still do."""
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
        """Count `work` for its client: `count` is 1 when it is queued, -1 when it has ended."""
        num_own, num_own_bytes = self._held.get(work.client, (0, 0))
        num_bytes = count * work.num_bytes
        self._num_held += count
        self._num_bytes_held += num_bytes
        self._held[work.client] = (num_own + count, num_own_bytes + num_bytes)
        if not num_own + count:
            del self._held[work.client]

    def _begin(self) -> None:
        """Start waiting work on free threads."""
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
                with contextlib.suppress(RuntimeError):  # raised if the loop is closed
                    loop.call_soon_threadsafe(self._end, work, future)

            self._threads.submit(call).add_done_callback(on_end)

    def _end(self, work: _Work, future: Future[Any]) -> None:
        self._lane(work.num_bytes).num_running -= 1
        self._hold(work, -1)
        if not work.result.done():  # it is cancelled if the client has gone
            if future.cancelled():
                work.result.cancel()
            elif (error := future.exception()) is not None:
                work.result.set_exception(error)
            else:
                work.result.set_result(future.result())
        if not future.cancelled():  # only `close` cancels it, after which nothing is started
            self._begin()


def _trimmed(function: Callable[[], R], num_bytes: int) -> Callable[[], R]:
    """`function`, followed for long work by returning freed memory to the system."""
    if num_bytes < TRIM_BYTES:
        return function

    def call() -> R:
        try:
            return function()
        finally:
            trim()

    return call
