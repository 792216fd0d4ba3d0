"""Followers: the processes of all ranks but the leader's, as the leader sees them.

The serving process is rank 0 and leads: it schedules, and what its executor is called it tells the
others through a ring. Beside that each has a socket: by it they plan and load together, and when
one ends, the other end hears of it at once. A follower outlives its leader by no more than that.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec
import torch

from pyserve import log
from pyserve.config import EngineConfig
from pyserve.engine.tensor_parallel import calls
from pyserve.engine.tensor_parallel.news import (
    BEAT_S,
    Beat,
    Begin,
    Failed,
    News,
    Start,
    encode,
    path_of,
    receive,
)
from pyserve.engine.tensor_parallel.ring import Ring
from pyserve.engine.tensor_parallel.spawned import CAUSE_S, Spawned, is_stuck, spawn
from pyserve.errors import DeviceError, StartupError
from pyserve.model.adapter_weights import AdapterWeights
from pyserve.ops.card_group import join_group
from pyserve.ops.group import LEADER, Group

NUM_PLACES = 64  # of the ring: a step takes three, and few steps are in flight
CALL_BYTES = 2**18  # of a message besides words and rows
# Without a beat it hangs: soon where none of its threads could run, later where one may only have
# been kept from it, as a busy machine does for a second or two.
STUCK_S, SILENT_S = 0.75, 5.0
OTHERS_S = 0.2  # that the end of a process may be heard of after what it does to others
END_S = 5.0  # to end in peace

_Kind = TypeVar("_Kind", bound=News)


class _Follower:
    """A process, and what has come from it that nobody has taken yet."""

    def __init__(self, spawned: Spawned, start: Start, meeting: int) -> None:
        self.tp_rank, self.sock, self.process = spawned.tp_rank, spawned.sock, spawned.process
        self.how_it_ended = spawned.how_it_ended
        with suppress(OSError):  # it has ended: its socket will say so
            socket.send_fds(self.sock, [encode(start)], [meeting])
        self.news: deque[News] = deque()
        self.heard_s = time.monotonic()


class Followers:
    """Those of one engine. Their processes run from the beginning to `close`.

    Files between ranks are memory that has a descriptor: none is left, however a rank ends.
    """

    def __init__(self, config: EngineConfig, spawned: Sequence[Spawned] = ()) -> None:
        """`spawned`: their processes, where those have been started already."""
        # Never closed: torch's store writes to what has this number as late as when it is freed.
        self._meeting = os.memfd_create("pyserve-meeting")
        self._changed = threading.Condition()
        self._lost: str | None = None
        self._on_lost: Callable[[str], object] | None = None
        self._is_closing = False
        self._ring: Ring | None = None
        # Files of adapters that the others may still have to open: a step puts in as many as there
        # are slots, and none is told before the one in front of it has ended everywhere.
        self._kept: deque[int] = deque()
        self._num_kept = config.num_adapter_slots
        level = logging.getLevelName(log.get_logger().getEffectiveLevel()).lower()
        self._all = [
            _Follower(it, Start(config, it.tp_rank, level), self._meeting)
            for it in spawned or spawn(config.tensor_parallel_size)
        ]
        self._listening = threading.Thread(target=self._listen, name="followers", daemon=True)
        self._listening.start()

    def join(self, device: torch.device) -> Group:
        """The leader's Group; the others come to it as soon as they have begun."""
        return join_group(path_of(self._meeting), LEADER, 1 + len(self._all), device)

    def wait(self, kind: type[_Kind], timeout_s: float) -> list[_Kind]:
        """The next word of that kind from each. Raises StartupError where one does not come."""
        found = []
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            for follower in self._all:
                while not (follower.news and isinstance(follower.news[0], kind)):
                    if self._lost is not None:
                        raise StartupError(self._lost)
                    if not self._changed.wait(deadline_s - time.monotonic()):
                        raise StartupError(
                            f"rank {follower.tp_rank} has not come so far within {timeout_s:.0f} s"
                        )
                found.append(follower.news.popleft())
        return found  # type: ignore[return-value]

    def begin(self, begin: Begin, *, num_step_words: int) -> None:
        """Let them load. From here on `tell` works."""
        message_bytes = CALL_BYTES + 4 * num_step_words + 5 * begin.max_num_batched_tokens
        self._ring = ring = Ring.create(
            len(self._all), message_bytes=message_bytes, num_places=NUM_PLACES
        )
        place_bytes, num_places = ring.sizes
        begin = msgspec.structs.replace(begin, place_bytes=place_bytes, num_places=num_places)
        for follower in self._all:
            with suppress(OSError):  # it has gone: `wait` tells why
                socket.send_fds(follower.sock, [encode(begin)], ring.fds)

    def tell(self, call: calls.AnyCall) -> None:
        """Have all make a call. Raises DeviceError where one does not take any more."""
        if self._lost is not None:
            raise DeviceError(self._lost)
        assert self._ring is not None
        try:
            self._ring.put(msgspec.msgpack.encode(call))
        except TimeoutError as error:
            raise DeviceError(self._lost or str(error)) from error

    def tell_adapter(self, slot: int, weights: AdapterWeights) -> None:
        """Have all put an adapter into a slot, from memory that has a path."""
        fd = os.memfd_create("pyserve-adapter")
        with os.fdopen(os.dup(fd), "wb") as file:
            for pair in weights.pairs.values():
                for matrix in (pair.a, pair.b):
                    file.write(matrix.contiguous().view(torch.uint8).numpy().data)
        self._kept.append(fd)
        if len(self._kept) > self._num_kept:
            os.close(self._kept.popleft())
        pairs = [
            calls.StoredPair(name, len(pair.a), pair.a.shape[1], len(pair.b), pair.scale)
            for name, pair in weights.pairs.items()
        ]
        (dtype,) = {str(pair.a.dtype) for pair in weights.pairs.values()}
        path = f"/proc/{os.getpid()}/fd/{fd}"
        self.tell(calls.PutAdapter(slot, path, dtype.removeprefix("torch."), pairs))

    def cause(self, error: Exception) -> str:
        """Why a step has failed with `error` here: most likely because a rank has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, CAUSE_S)
        first_line, _, _ = str(error).partition("\n")
        return self._lost or f"the ranks are out of step: {type(error).__name__}: {first_line}"

    def watch(self, on_lost: Callable[[str], object]) -> None:
        """Have on_lost(why) called, on another thread, when one of them has ended or hangs."""
        with self._changed:
            for follower in self._all:
                follower.heard_s = time.monotonic()
            self._on_lost = on_lost
            if self._lost is not None:
                on_lost(self._lost)

    def kill(self) -> None:
        """At once."""
        self._is_closing = True
        for follower in self._all:
            follower.process.kill()
            follower.process.wait()

    def close(self) -> None:
        """Have them end, and wait for it. Harmless when called again."""
        self._is_closing = True
        for follower in self._all:
            with suppress(OSError):
                follower.sock.shutdown(socket.SHUT_RDWR)
        deadline_s = time.monotonic() + END_S
        for follower in self._all:
            with suppress(subprocess.TimeoutExpired):
                follower.process.wait(max(0.0, deadline_s - time.monotonic()))
        self.kill()
        self._listening.join()
        for follower in self._all:
            follower.sock.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        while self._kept:
            os.close(self._kept.pop())

    def _listen(self) -> None:
        """On a thread of its own, until one is lost or all are closed."""
        with selectors.DefaultSelector() as selector:
            for follower in self._all:
                selector.register(follower.sock, selectors.EVENT_READ, follower)
            looked_s = time.monotonic()
            while self._lost is None and not self._is_closing:
                ready = [key.data for key, _ in selector.select(BEAT_S)]
                now_s = time.monotonic()
                if now_s - looked_s > 2 * BEAT_S:  # this process did not run: nor could it hear
                    for follower in self._all:
                        follower.heard_s = now_s
                looked_s = now_s
                for follower in ready:
                    self._hear(follower, now_s)
                self._look(now_s)

    def _hear(self, follower: _Follower, now_s: float) -> None:
        try:
            news, _ = receive(follower.sock)
        except OSError:
            news = None
        follower.heard_s = now_s
        if isinstance(news, Beat):
            return
        if isinstance(news, Failed):
            self._lose(self._first_to_end(follower) or f"rank {follower.tp_rank}: {news.reason}")
        elif news is None:
            self._lose(f"rank {follower.tp_rank} {follower.how_it_ended()}")
        else:
            with self._changed:
                follower.news.append(news)
                self._changed.notify_all()

    def _first_to_end(self, failed: _Follower) -> str | None:
        """Another rank that has ended: what fails in this one's step may come of it, and be heard
        of first. One that exits with 1 has failed itself."""
        deadline_s = time.monotonic() + OTHERS_S
        while True:
            for other in self._all:
                if other is not failed and other.process.poll() not in (None, 1):
                    return f"rank {other.tp_rank} {other.how_it_ended()}"
            if time.monotonic() > deadline_s:
                return None
            time.sleep(0.005)

    def _look(self, now_s: float) -> None:
        """For who lives and says nothing; loading holds the interpreter's lock and counts not."""
        if self._on_lost is None:
            return
        for follower in self._all:
            silent_s = now_s - follower.heard_s
            if silent_s > SILENT_S or (silent_s > STUCK_S and is_stuck(follower.process.pid)):
                self._lose(f"rank {follower.tp_rank} hangs: not a word for {silent_s:.1f} s")

    def _lose(self, reason: str) -> None:
        if self._is_closing:
            return
        with self._changed:
            if self._lost is None:
                self._lost = reason
                self._changed.notify_all()
                if self._on_lost is not None:
                    self._on_lost(reason)
