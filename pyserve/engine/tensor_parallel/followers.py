"""Followers: the leader's view of the other ranks' processes.

The serving process is rank 0, the leader. It schedules, and it sends each call of its executor to
the followers through a shared-memory ring. Each follower also has a socket to the leader: they use
it while planning and loading, and since a socket closes when its process ends, each side notices at
once that the other has gone. So a follower does not outlive its leader.
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

NUM_PLACES = 64  # messages in the ring: a step takes three, and few steps are in flight
CALL_BYTES = 2**18  # room in a message besides the packed step and the prompt rows
# A follower hangs if its heartbeat is missing: for STUCK_S where none of its threads is running or
# runnable, for SILENT_S otherwise, as a busy machine may delay a thread for a second or two.
STUCK_S, SILENT_S = 0.75, 5.0
START_STUCK_S = 15.0  # the same as STUCK_S during the start, when loading may block for long
OTHERS_S = 0.2  # a process's end may be noticed this much later than the errors it causes elsewhere
END_S = 5.0  # how long `close` waits for followers to end by themselves

_Kind = TypeVar("_Kind", bound=News)


class _Follower:
    """One follower process, and its messages that nobody has taken yet."""

    def __init__(self, spawned: Spawned, start: Start, meeting: int) -> None:
        self.tp_rank, self.sock, self.process = spawned.tp_rank, spawned.sock, spawned.process
        self.how_it_ended = spawned.how_it_ended
        with suppress(OSError):  # it has ended already; _listen will notice
            socket.send_fds(self.sock, [encode(start)], [meeting])
        self.news: deque[News] = deque()
        self.heard_s = self.ran_s = time.monotonic()


class Followers:
    """The followers of one engine. Their processes run from the constructor to `close`.

    Files that ranks share are memfds, so none is left behind, however a rank ends.
    """

    def __init__(self, config: EngineConfig, spawned: Sequence[Spawned] = ()) -> None:
        """spawned: the followers' processes, if they have been started already."""
        # Never closed: torch's store opens it by its number, even as late as in its destructor.
        self._meeting = os.memfd_create("pyserve-meeting")
        self._changed = threading.Condition()
        self._lost: str | None = None
        self._on_lost: Callable[[str], object] | None = None
        self._is_closing = self._is_joining = False
        self._ring: Ring | None = None
        # Files of adapters that followers may not have opened yet. One step loads at most as many
        # adapters as there are slots, and its loads are sent only after the step before it has
        # ended on all ranks, so keeping that many files open is enough.
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
        """Join the process group as the leader; the followers join after they got `begin`.

        Raises StartupError if one does not.
        """
        self._is_joining = True
        try:
            return join_group(path_of(self._meeting), LEADER, 1 + len(self._all), device)
        except DeviceError as error:
            raise StartupError(self.cause(error)) from error
        finally:
            self._is_joining = False

    def wait(self, kind: type[_Kind], timeout_s: float) -> list[_Kind]:
        """Wait for the next message, of type `kind`, of every follower; in the order of ranks.

        Raises StartupError if one is lost or does not come within timeout_s.
        """
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
        """Create the ring and let the followers load. `tell` works from here on."""
        message_bytes = CALL_BYTES + 4 * num_step_words + 5 * begin.max_num_batched_tokens
        self._ring = ring = Ring.create(
            len(self._all), message_bytes=message_bytes, num_places=NUM_PLACES
        )
        place_bytes, num_places = ring.sizes
        begin = msgspec.structs.replace(begin, place_bytes=place_bytes, num_places=num_places)
        for follower in self._all:
            with suppress(OSError):  # it has ended; `wait` will raise with the reason
                socket.send_fds(follower.sock, [encode(begin)], ring.fds)

    def tell(self, call: calls.AnyCall) -> None:
        """Send a call to all followers. Raises DeviceError if one is lost or takes no calls."""
        if self._lost is not None:
            raise DeviceError(self._lost)
        assert self._ring is not None
        try:
            self._ring.put(msgspec.msgpack.encode(call))
        except TimeoutError as error:
            raise DeviceError(self._lost or str(error)) from error

    def tell_adapter(self, slot: int, weights: AdapterWeights) -> None:
        """Have all followers put an adapter into a slot; its weights travel through a memfd."""
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
        """The reason to report for a step that failed with `error` on the leader.

        Most likely another rank has ended, so this waits up to CAUSE_S to hear of that.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, CAUSE_S)
        first_line, _, _ = str(error).partition("\n")
        return self._lost or f"the ranks are out of step: {type(error).__name__}: {first_line}"

    def watch(self, on_lost: Callable[[str], object]) -> None:
        """Have on_lost(reason) called, on another thread, when a follower has ended or hangs."""
        with self._changed:
            for follower in self._all:
                follower.heard_s = time.monotonic()
            self._on_lost = on_lost
            if self._lost is not None:
                on_lost(self._lost)

    def kill(self) -> None:
        """End all followers at once. Harmless when called again."""
        self._is_closing = True
        for follower in self._all:
            follower.process.kill()
            follower.process.wait()

    def close(self) -> None:
        """Have all followers end, and wait for it; kills those that take longer than END_S.

        Harmless when called again.
        """
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
        """Receive the followers' messages until one is lost or `close`; on a thread of its own."""
        with selectors.DefaultSelector() as selector:
            for follower in self._all:
                selector.register(follower.sock, selectors.EVENT_READ, follower)
            looked_s = time.monotonic()
            while self._lost is None and not self._is_closing:
                ready = [key.data for key, _ in selector.select(BEAT_S)]
                now_s = time.monotonic()
                if now_s - looked_s > 2 * BEAT_S:  # this process itself was stopped and heard none
                    for follower in self._all:
                        follower.heard_s = follower.ran_s = now_s
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
        """How another rank ended, if one did: `failed` may have failed only because of that, and
        its message may arrive first. Exit code 1 does not count, as such a rank reports its own
        failure."""
        deadline_s = time.monotonic() + OTHERS_S
        while True:
            for other in self._all:
                if other is not failed and other.process.poll() not in (None, 1):
                    return f"rank {other.tp_rank} {other.how_it_ended()}"
            if time.monotonic() > deadline_s:
                return None
            time.sleep(0.005)

    def _look(self, now_s: float) -> None:
        """Look for followers that hang.

        Before `watch` was called heartbeats are not required, as loading may hold the GIL for long,
        but a thread of the process has to be running or runnable now and then.
        """
        if self._on_lost is None:
            for follower in self._all:
                if follower.heard_s == now_s or not is_stuck(follower.process.pid):
                    follower.ran_s = now_s
                elif now_s - max(follower.ran_s, follower.heard_s) > START_STUCK_S:
                    self._lose(f"rank {follower.tp_rank} hangs: it does not run")
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
        self._end_joining(reason)

    def _end_joining(self, reason: str) -> None:
        """Where torch waits for a rank that has gone, it would do so for ten minutes, and nothing
        else ends that: this process does."""
        deadline_s = time.monotonic() + CAUSE_S
        while self._is_joining and time.monotonic() < deadline_s:
            time.sleep(0.05)
        if self._is_joining:
            log.get_logger().error("%s", reason)
            log.flush()
            self.kill()
            os._exit(1)
