"""Runs: responses of the Responses API that are generated in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pyserve.api.http.budget import ByteBudget
from pyserve.errors import QueueFullError, TooManyBytesError

MAX_RUNS, MAX_CLIENT_RUNS = 1024, 512  # at a time, of all clients and of one
RETRY_S = 5  # Retry-After of a response that there is no room for


@dataclass(slots=True, eq=False)
class Run:
    """A response in the background, until it has ended and is stored.

    user, client     the user it belongs to, and the client that limits count it for (keys.py).
    input            its own input items, as JSON.
    describe         a status -> the response object with that status, as JSON.
    is_streamed      its events are kept, so that clients can read them.
    has_begun        returns whether it has left the engine's queue.
    events           its server-sent events so far, where it is streamed.
    is_over          no further event will come.
    is_wanted        it is to be stored when it has ended.
    answer           the final response object as JSON, once it has ended.
    task             the task that generates it.
    readers          events to set when there are new events, or no more.
    num_event_bytes  size of `events`, in bytes.
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
        """Wake all readers: there are new events, or no more."""
        for reader in self.readers:
            reader.set()

    async def cancel(self) -> None:
        """Cancel the task and wait until it has ended."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])


class Runs:
    """The background responses of one server.

    max_event_bytes  limit on the events of all of them, in bytes; one client may have half of it.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._runs: dict[tuple[str, str], Run] = {}
        self._events = ByteBudget(max_event_bytes, max_event_bytes // 2)

    def __len__(self) -> int:
        return len(self._runs)

    def check_room(self, client: str) -> None:
        """Raise QueueFullError where `client` may not start another one now."""
        num_own = sum(run.client == client for run in self._runs.values())
        if len(self._runs) >= MAX_RUNS or num_own >= MAX_CLIENT_RUNS:
            raise QueueFullError(
                f"{len(self._runs)} responses run in the background, {num_own} of them of this "
                f"client: the limits are {MAX_RUNS} and {MAX_CLIENT_RUNS}",
                RETRY_S,
            )

    def add(self, run: Run) -> None:
        """Register a run that begins."""
        self._runs[run.user, run.id] = run

    def get(self, user: str, response_id: str) -> Run | None:
        """`user`'s run with this id; None where there is none, or it has ended."""
        return self._runs.get((user, response_id))

    def append(self, run: Run, events: Sequence[bytes]) -> None:
        """Keep more events of `run` and wake its readers. Does not check the limit."""
        num_bytes = sum(map(len, events))
        self._events.add(run.client, num_bytes)
        run.num_event_bytes += num_bytes
        run.events += events
        run.wake()

    def check_events(self, run: Run) -> None:
        """Raise TooManyBytesError where events exceed the limits, so that `run` must end."""
        budget = self._events
        if not budget.has_room(run.client, 0):
            raise TooManyBytesError(
                f"the events of responses in the background take {budget.num_bytes} bytes, of "
                f"{budget.max_bytes} that all may take and {budget.max_client_bytes} those of one "
                "client",
                RETRY_S,
            )

    def remove(self, run: Run) -> None:
        """Forget a run that has ended. Whoever still reads its events holds the Run itself."""
        del self._runs[run.user, run.id]
        self._events.add(run.client, -run.num_event_bytes)
        run.is_over = True
        run.wake()
