"""All connections of one server: how many there are, which are closed, whose clients have gone.

    accept -> [TLS handshake] -> idle -> request -> idle ...      counted from the accept on

A place is one descriptor. When there is none left, a new connection takes that of one that is idle
or stands still. Clients that cannot be heard leave are probed, and those that do not take what is
written to them are cut off: both by one timer, which runs only while there are any.
"""

from __future__ import annotations

import resource
import select
import time
from asyncio import Task, TimerHandle, get_running_loop
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pyserve.api.http import bounds
from pyserve.api.http.budget import ByteBudget
from pyserve.errors import TooManyBytesError
from pyserve.log import get_logger

GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Connection(Protocol):
    """What is asked of a connection here; http_protocol.py has the one there is.

    client            its address; "" where it has none.
    opening           done once it is open, its TLS handshake included.
    is_idle           no request has come that is not answered.
    has_asked         a request has come, answered or not.
    is_unheard        a request runs, and nothing is read meanwhile.
    is_over           its client has ended its side, and all is answered.
    num_unsent_bytes  written, and not taken by the kernel yet.
    is_tls            its client cannot end one side alone.
    """

    client: str
    opening: Task[None] | None
    has_asked: bool

    @property
    def is_idle(self) -> bool: ...
    @property
    def is_unheard(self) -> bool: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def num_unsent_bytes(self) -> int: ...
    @property
    def is_tls(self) -> bool: ...

    def is_expendable(self, now_s: float) -> bool:
        """Whether a new connection may have its place."""

    def fileno(self) -> int: ...

    def probe(self, now_s: float) -> bool:
        """Write something, so that the machine of a client that has gone answers with a reset.

        True the first time.
        """

    def cut(self) -> None:
        """Close it at once, whatever it does; what is unsent is dropped."""

    def finish(self) -> None:
        """Close it once all is sent."""


class Connections:
    """The table of them. It lives on the event loop."""

    def __init__(self, *, is_tls: bool) -> None:
        self.max = _max_connections(
            bounds.MAX_TLS_CONNECTIONS if is_tls else bounds.MAX_CONNECTIONS
        )
        self.write_timeout_s = bounds.WRITE_TIMEOUT_S
        self._all: OrderedDict[Connection, None] = OrderedDict()  # the idlest first
        self._unheard: dict[Connection, None] = {}
        # Those that do not take what is written: since when, and how many bytes of it are counted.
        self._stalled: dict[Connection, tuple[float, int]] = {}
        self._answers: dict[Connection, int] = {}  # bytes of the one that is being written
        self._unread = ByteBudget(bounds.MAX_UNREAD_BYTES, bounds.MAX_UNREAD_BYTES)
        self._timer: TimerHandle | None = None
        self._may_log_at_s = 0.0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def num_unread_bytes(self) -> int:
        """Of answers that their clients have not taken."""
        return self._unread.num_bytes

    def make_place(self) -> bool:
        """Whether there may be one more; where all places are taken, another is closed for it."""
        if len(self._all) < self.max:
            return True
        self.log(f"{self.max} connections are open: idle ones are closed for new ones")
        return self.cut_expendable()

    def cut_expendable(self) -> bool:
        """Close the connection that is needed least; False where none can be spared."""
        now_s = time.monotonic()
        for _ in range(min(bounds.NUM_LOOKED_AT, len(self._all))):
            connection = next(iter(self._all))
            if connection.is_expendable(now_s):
                self.cut(connection)
                return True
            self._all.move_to_end(connection)
        return False

    def add(self, connection: Connection) -> None:
        """It has been accepted."""
        self._all[connection] = None

    def touch(self, connection: Connection) -> None:
        """It has begun or ended a request, so it comes last in the order of idleness."""
        if connection in self._all:
            self._all.move_to_end(connection)

    def remove(self, connection: Connection) -> None:
        """It is closed, or will be at once; may be repeated."""
        self._all.pop(connection, None)
        self._unheard.pop(connection, None)
        self.flow(connection)
        self._unread.add(connection.client, -self._answers.pop(connection, 0))

    def cut(self, connection: Connection) -> None:
        """Close it at once; its place and what it holds are free from here on."""
        self.remove(connection)
        connection.cut()

    def close_idle(self) -> None:
        """The server shuts down: close idle connections, wait less for clients that do not read.

        On a new one the first request is under way: it is answered as long as others are.
        """
        self.write_timeout_s = bounds.DRAIN_WRITE_TIMEOUT_S
        for connection in list(self._all):
            if connection.is_idle and connection.has_asked:
                connection.finish()

    def watch(self, connection: Connection) -> None:
        """Its client could leave unheard from here on, as long as `is_unheard`."""
        if connection in self._all:
            self._unheard[connection] = None
            self._arm(bounds.FIRST_PROBE_S)

    def stall(self, connection: Connection) -> None:
        """Its client has not taken all that was written."""
        if connection in self._stalled or connection not in self._all:
            return
        num_bytes = connection.num_unsent_bytes
        self._stalled[connection] = (time.monotonic(), num_bytes)
        self._unread.add(connection.client, num_bytes)
        self._make_room(connection.client, 0, but=connection)
        self._arm(bounds.PROBE_S)

    def flow(self, connection: Connection) -> None:
        """Its client has taken it; harmless where it was not stalled."""
        _, num_bytes = self._stalled.pop(connection, (0.0, 0))
        self._unread.add(connection.client, -num_bytes)

    def check_unread(self, connection: Connection, num_bytes: int) -> None:
        """Raise TooManyBytesError where there is no room for an answer of `num_bytes` now."""
        if not self._make_room(connection.client, num_bytes, but=connection):
            raise TooManyBytesError(
                f"{self._unread.num_bytes} bytes of answers wait for their clients to read them, "
                f"with the {num_bytes} of this one more than the limit of "
                f"{self._unread.max_bytes}",
                bounds.UNREAD_RETRY_S,
            )

    @contextmanager
    def unread(self, connection: Connection, num_bytes: int) -> Iterator[None]:
        """Count an answer of `num_bytes` while it is written. Raises as `check_unread`."""
        self.check_unread(connection, num_bytes)
        self._answers[connection] = num_bytes
        self._unread.add(connection.client, num_bytes)
        try:
            yield
        finally:
            self._unread.add(connection.client, -self._answers.pop(connection, 0))

    def log(self, line: str) -> None:
        """Warn of what happens to connections, now and then."""
        now_s = time.monotonic()
        if now_s >= self._may_log_at_s:
            self._may_log_at_s = now_s + bounds.LOG_INTERVAL_S
            get_logger().warning("%s", line)

    def close(self) -> None:
        """Stop the timer; what is still open is left to its owner."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_room(self, client: str, num_bytes: int, *, but: Connection) -> bool:
        """Make room for `num_bytes` of `client`: cut off who takes nothing and holds most."""
        if num_bytes > self._unread.max_bytes:
            return False
        while not self._unread.has_room(client, num_bytes):
            largest = self._unread.largest_client
            stalled = [c for c in self._stalled if c is not but]
            victim = next((c for c in stalled if c.client == largest), next(iter(stalled), None))
            if victim is None:
                return False
            self.log("clients do not read their answers: those that stand still are cut off")
            self.cut(victim)
        return True

    def _arm(self, delay_s: float) -> None:
        loop = get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay_s:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        has_new = self._probe(now_s)
        self._cut_stalled(now_s)
        if self._unheard or self._stalled:
            self._arm(bounds.FIRST_PROBE_S if has_new else bounds.PROBE_S)

    def _probe(self, now_s: float) -> bool:
        """Cut off whose client has gone, probe the others; True: some for the first time."""
        poll = select.poll()
        by_fileno: dict[int, Connection] = {}
        for connection in list(self._unheard):
            if connection.is_over:
                connection.finish()
            elif connection.is_unheard:
                by_fileno[connection.fileno()] = connection
                is_end = select.POLLRDHUP if connection.is_tls else 0
                poll.register(connection.fileno(), is_end)
                continue
            del self._unheard[connection]
        for fileno, events in poll.poll(0) if by_fileno else ():
            if events & (GONE | select.POLLRDHUP):
                self.cut(by_fileno.pop(fileno))
        has_new = False
        for connection in by_fileno.values():
            has_new |= connection.probe(now_s)
        return has_new

    def _cut_stalled(self, now_s: float) -> None:
        for connection, (since_s, _) in list(self._stalled.items()):
            if not connection.num_unsent_bytes:
                self.flow(connection)
            elif now_s - since_s > self.write_timeout_s:
                self.cut(connection)


def _max_connections(wanted: int) -> int:
    """As many as there may be descriptors for; the limit of the process is raised where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = wanted + bounds.NUM_OTHER_FILES
    if soft < num_files and (hard > soft or hard == resource.RLIM_INFINITY):
        soft = num_files if hard == resource.RLIM_INFINITY else min(num_files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(soft - bounds.NUM_OTHER_FILES, wanted))
