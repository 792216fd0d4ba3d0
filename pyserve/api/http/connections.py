"""Connections: the table of a server's connections, which enforces the limits in bounds.py.

    accept -> [TLS handshake] -> idle -> request -> idle ...      counted from the accept on

Each connection takes one file descriptor. When the limit is reached, a connection that is idle or
makes no progress is closed for a new one. Connections that are not read are probed to find out
whether the client has gone, and clients that do not read what is written to them are cut off. One
timer does both; it runs only while there are such connections.
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
    """What this module needs of a connection; HttpProtocol in http_protocol.py implements it.

    client            the client's address, as keys.network gives it; "" where it has none.
    opening           task that ends when the connection is open, its TLS handshake included.
    is_idle           every request that has arrived has been answered.
    has_asked         at least one request has arrived, answered or not.
    is_unheard        a request runs and the socket is not read, so a client that has gone would
                      not be noticed.
    is_over           the client has shut down its sending side, and all its requests are answered.
    num_unsent_bytes  bytes that were written and that the kernel has not taken yet.
    is_tls            over TLS a client cannot shut down its sending side alone.
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
        """Whether it may be closed to make room for a new connection; `now_s` is monotonic."""

    def fileno(self) -> int: ...

    def probe(self, now_s: float) -> bool:
        """Write something if possible, so that a client that has gone answers with a reset.

        Returns True if this is the first probe during the running request.
        """

    def cut(self) -> None:
        """Close it at once, even in the middle of a request; unsent bytes are dropped."""

    def finish(self) -> None:
        """Close it once everything written has been sent."""


class Connections:
    """The connections of one server. All methods run on the event loop.

    max              maximum number of connections, as far as RLIMIT_NOFILE allows.
    write_timeout_s  seconds after which a client that does not read is cut off.
    """

    def __init__(self, *, is_tls: bool) -> None:
        self.max = _max_connections(
            bounds.MAX_TLS_CONNECTIONS if is_tls else bounds.MAX_CONNECTIONS
        )
        self.write_timeout_s = bounds.WRITE_TIMEOUT_S
        self._all: OrderedDict[Connection, None] = OrderedDict()  # least recently used first
        self._unheard: dict[Connection, None] = {}
        # Connections whose clients do not read what is written: since when, and the unsent bytes
        # that are counted in _unread for that.
        self._stalled: dict[Connection, tuple[float, int]] = {}
        self._answers: dict[Connection, int] = {}  # size of the response being written
        self._unread = ByteBudget(bounds.MAX_UNREAD_BYTES, bounds.MAX_UNREAD_BYTES)
        self._timer: TimerHandle | None = None
        self._may_log_at_s = 0.0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def num_unread_bytes(self) -> int:
        """Bytes of responses that clients have not read."""
        return self._unread.num_bytes

    def make_place(self) -> bool:
        """Whether one more connection may be opened; a full table first closes another for it."""
        if len(self._all) < self.max:
            return True
        self.log(f"{self.max} connections are open: idle ones are closed for new ones")
        return self.cut_expendable()

    def cut_expendable(self) -> bool:
        """Close the least recently used expendable connection.

        Looks at NUM_LOOKED_AT connections at most. Returns False where none of them is expendable.
        """
        now_s = time.monotonic()
        for _ in range(min(bounds.NUM_LOOKED_AT, len(self._all))):
            connection = next(iter(self._all))
            if connection.is_expendable(now_s):
                self.cut(connection)
                return True
            self._all.move_to_end(connection)
        return False

    def add(self, connection: Connection) -> None:
        """Count a connection that has just been accepted."""
        self._all[connection] = None

    def touch(self, connection: Connection) -> None:
        """Mark a connection as most recently used: it has begun or ended a request."""
        if connection in self._all:
            self._all.move_to_end(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed or is about to be. May be called again."""
        self._all.pop(connection, None)
        self._unheard.pop(connection, None)
        self.flow(connection)
        self._unread.add(connection.client, -self._answers.pop(connection, 0))

    def cut(self, connection: Connection) -> None:
        """Close a connection at once, and free its place and its counted bytes immediately."""
        self.remove(connection)
        connection.cut()

    def close_idle(self) -> None:
        """Begin the shutdown: close idle connections and shorten the write timeout.

        A connection without any request yet stays open: its first request is probably on its way,
        and is answered as long as the server still answers.
        """
        self.write_timeout_s = bounds.DRAIN_WRITE_TIMEOUT_S
        for connection in list(self._all):
            if connection.is_idle and connection.has_asked:
                connection.finish()

    def watch(self, connection: Connection) -> None:
        """Probe a connection from now on, for as long as it `is_unheard`."""
        if connection in self._all:
            self._unheard[connection] = None
            self._arm(bounds.FIRST_PROBE_S)

    def stall(self, connection: Connection) -> None:
        """Count the unsent bytes of a connection whose client has not read all that was written.

        To keep within MAX_UNREAD_BYTES this may cut off other stalled connections.
        """
        if connection in self._stalled or connection not in self._all:
            return
        num_bytes = connection.num_unsent_bytes
        self._stalled[connection] = (time.monotonic(), num_bytes)
        self._unread.add(connection.client, num_bytes)
        self._make_room(connection.client, 0, but=connection)
        self._arm(bounds.PROBE_S)

    def flow(self, connection: Connection) -> None:
        """End a stall: the client has read what was written. Does nothing where none began."""
        _, num_bytes = self._stalled.pop(connection, (0.0, 0))
        self._unread.add(connection.client, -num_bytes)

    def check_unread(self, connection: Connection, num_bytes: int) -> None:
        """Raise TooManyBytesError where there is no room for a response of `num_bytes` now.

        Cuts off stalled connections first, if that makes room.
        """
        if not self._make_room(connection.client, num_bytes, but=connection):
            raise TooManyBytesError(
                f"{self._unread.num_bytes} bytes of answers wait for their clients to read them, "
                f"with the {num_bytes} of this one more than the limit of "
                f"{self._unread.max_bytes}",
                bounds.UNREAD_RETRY_S,
            )

    @contextmanager
    def unread(self, connection: Connection, num_bytes: int) -> Iterator[None]:
        """Count a response of `num_bytes` while the context lasts. Raises TooManyBytesError."""
        self.check_unread(connection, num_bytes)
        self._answers[connection] = num_bytes
        self._unread.add(connection.client, num_bytes)
        try:
            yield
        finally:
            self._unread.add(connection.client, -self._answers.pop(connection, 0))

    def log(self, line: str) -> None:
        """Log a warning about connections, at most once per LOG_INTERVAL_S."""
        now_s = time.monotonic()
        if now_s >= self._may_log_at_s:
            self._may_log_at_s = now_s + bounds.LOG_INTERVAL_S
            get_logger().warning("%s", line)

    def close(self) -> None:
        """Stop the timer. Does not close connections: aiohttp's runner does that."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_room(self, client: str, num_bytes: int, *, but: Connection) -> bool:
        """Make room for `num_bytes` of `client` by cutting off stalled connections but `but`.

        Those of the client that holds most bytes go first, then whichever stalled longest ago.
        Returns False where that does not make enough room.
        """
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
        """Cut off connections whose clients have gone and probe the others.

        Returns True if any of them was probed for the first time.
        """
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
    """`wanted`, or fewer where RLIMIT_NOFILE leaves too few descriptors.

    Raises the soft limit of the process as far as its hard limit allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = wanted + bounds.NUM_OTHER_FILES
    if soft < num_files and (hard > soft or hard == resource.RLIM_INFINITY):
        soft = num_files if hard == resource.RLIM_INFINITY else min(num_files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(soft - bounds.NUM_OTHER_FILES, wanted))
