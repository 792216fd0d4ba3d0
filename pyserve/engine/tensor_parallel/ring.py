"""Ring: a queue in shared memory by which one process sends messages to several readers; each
message goes to all of them."""

from __future__ import annotations

import mmap
import os
import time
from typing import Final

import numpy as np

COUNTER_BYTES: Final = 64  # each counter has a cache line of its own, to avoid false sharing
LENGTH_BYTES: Final = 8
FULL_S = 30.0  # how long `put` waits for a reader while the ring is full
LOOK_S = 5e-5  # interval at which `put` looks again while the ring is full


class Ring:
    """Holds up to `num_places` messages of at most `place_bytes` each, with their length.

    The memory begins with int64 counters: the number of messages written, then for each reader the
    number of messages that it has read. A place is reused once all readers have read it. A reader
    without messages blocks on an eventfd of its own.

    fds   file descriptors of the shared memory and of the readers' eventfds; a process that gets
          them can use the ring.
    """

    def __init__(self, fds: list[int], *, place_bytes: int, num_places: int) -> None:
        self.fds = fds
        self._place_bytes, self._num_places = place_bytes, num_places
        num_counters = len(fds)
        begin = num_counters * COUNTER_BYTES
        self._memory = mmap.mmap(fds[0], begin + num_places * place_bytes)
        counters = np.frombuffer(self._memory, np.int64, num_counters * COUNTER_BYTES // 8)
        self._counters = counters.reshape(num_counters, -1)[:, 0]
        self._begin = begin

    @classmethod
    def create(cls, num_readers: int, *, message_bytes: int, num_places: int) -> Ring:
        """Create the shared memory and eventfds. message_bytes: of the longest message."""
        place_bytes = -(-(message_bytes + LENGTH_BYTES) // COUNTER_BYTES) * COUNTER_BYTES
        memory = os.memfd_create("pyserve-ring")
        os.ftruncate(memory, (1 + num_readers) * COUNTER_BYTES + num_places * place_bytes)
        fds = [memory, *(os.eventfd(0) for _ in range(num_readers))]
        return cls(fds, place_bytes=place_bytes, num_places=num_places)

    @property
    def sizes(self) -> tuple[int, int]:
        """(place_bytes, num_places), which a reader needs besides the file descriptors."""
        return self._place_bytes, self._num_places

    def put(self, message: bytes) -> None:
        """Send a message to all readers.

        Raises TimeoutError if the ring stays full for FULL_S because a reader does not read.
        """
        assert len(message) + LENGTH_BYTES <= self._place_bytes, len(message)
        counters, number = self._counters, int(self._counters[0])
        deadline_s = 0.0
        while number - int(counters[1:].min()) >= self._num_places:
            now_s = time.monotonic()
            deadline_s = deadline_s or now_s + FULL_S
            if now_s > deadline_s:
                behind = 1 + int(counters[1:].argmin())
                raise TimeoutError(f"rank {behind} has taken nothing for {FULL_S:.0f} s")
            time.sleep(LOOK_S)
        at = self._begin + number % self._num_places * self._place_bytes
        length = len(message).to_bytes(LENGTH_BYTES, "little")
        self._memory[at : at + LENGTH_BYTES + len(message)] = length + message
        counters[0] = number + 1
        for fd in self.fds[1:]:  # the system call also orders the writes above before the wake-up
            os.eventfd_write(fd, 1)

    def get(self, reader: int) -> bytes:
        """Wait for the next message of reader number `reader`, which counts from 0."""
        counters, number = self._counters, int(self._counters[1 + reader])
        while int(counters[0]) <= number:
            os.eventfd_read(self.fds[1 + reader])
        at = self._begin + number % self._num_places * self._place_bytes
        end = at + LENGTH_BYTES
        length = int.from_bytes(self._memory[at:end], "little")
        message = self._memory[end : end + length]
        counters[1 + reader] = number + 1
        return message

    def close(self) -> None:
        """Close the descriptors; the memory is freed once all processes have closed theirs."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []
