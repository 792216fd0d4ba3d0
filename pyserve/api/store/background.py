"""Responses that are generated while no client waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pyserve.api.http.budget import ByteBudget
from pyserve.errors import QueueFullError, TooManyBytesError

MAX_RUNS, MAX_CLIENT_RUNS = 1024, 512  # at a time, and of one client
RETRY_S = 5


@dataclass(slots=True, eq=False)
class Run:
    """A response in the background, until it has ended and is stored.

    user, client  whose it is, and with whom it shares what is scarce.
    input         its own items, as JSON.
    describe      its JSON, with a status.
    has_begun     whether it has left the queue.
    is_streamed   its events are kept.
    is_over       no event comes any more.
    is_wanted     it is stored when it has ended.
    answer        its JSON, when it has ended.
    """

    id: str
    user: str
    client: str
    input: bytes
    describe: Callable[[str], bytes]
    is_streamed: bool
    has_begun: Callable[[], bool] = lambda: False
    events: list[bytes] = field(default_factory=list)
    is_over: bool = False
    is_wanted: bool = True
    answer: bytes = b""
    task: asyncio.Task[None] | None = None
    readers: set[asyncio.Event] = field(default_factory=set)
    num_event_bytes: int = 0

    @property
    def status(self) -> str:
        return "in_progress" if self.has_begun() else "queued"

    def wake(self) -> None:
        """There are new events, or no more."""
        for reader in self.readers:
            reader.set()

    async def cancel(self) -> None:
        """Stop it, and wait until it has stopped."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])


class Runs:
    """Those of one server.

    max_event_bytes  of the events of all of them, of which one client may have half.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._runs: dict[tuple[str, str], Run] = {}
        self._events = ByteBudget(max_event_bytes, max_event_bytes // 2)

    def __len__(self) -> int:
        return len(self._runs)

    def check_room(self, client: str) -> None:
        """Raise QueueFullError where `client` may have no further one now."""
        num_own = sum(run.client == client for run in self._runs.values())
        if len(self._runs) >= MAX_RUNS or num_own >= MAX_CLIENT_RUNS:
            raise QueueFullError(
                f"{len(self._runs)} responses run in the background, {num_own} of them of this "
                f"client: the limits are {MAX_RUNS} and {MAX_CLIENT_RUNS}",
                RETRY_S,
            )

    def add(self, run: Run) -> None:
        """It begins."""
        self._runs[run.user, run.id] = run

    def get(self, user: str, response_id: str) -> Run | None:
        """`user`'s run of this id, as long as it runs."""
        return self._runs.get((user, response_id))

    def append(self, run: Run, events: Sequence[bytes]) -> None:
        """Keep more events, whether there is room or not."""
        num_bytes = sum(map(len, events))
        self._events.add(run.client, num_bytes)
        run.num_event_bytes += num_bytes
        run.events += events
        run.wake()

    def check_events(self, run: Run) -> None:
        """Raise TooManyBytesError where the events take too much: `run` cannot go on."""
        budget = self._events
        if not budget.has_room(run.client, 0):
            raise TooManyBytesError(
                f"the events of responses in the background take {budget.num_bytes} bytes, of "
                f"{budget.max_bytes} that all may take and {budget.max_client_bytes} those of one "
                "client",
                RETRY_S,
            )

    def remove(self, run: Run) -> None:
        """It has ended; who still reads its events holds them."""
        del self._runs[run.user, run.id]
        self._events.add(run.client, -run.num_event_bytes)
        run.is_over = True
        run.wake()
