"""BatchWork: sends the lines of a batch to the server and puts their answers into its journal.

Several lines are in flight at once. A line that is not a valid request gets an error as its answer,
and the others go on. A request that is refused with 429 is repeated until it is accepted. If the
engine gives up or this is cancelled, the lines that have no answer yet stay without one; the next
run with the same journal continues with them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from io import BufferedReader

from pyserve.api.batches.journal import FSYNC_S, Journal
from pyserve.api.batches.lines import (
    BadLineError,
    BatchLine,
    answer_of,
    lines_of,
    max_line_bytes,
    read_line,
    refusal,
    some_lines,
)
from pyserve.api.http.inner import InnerClient
from pyserve.client import EngineClient
from pyserve.errors import PyserveError
from pyserve.http_client import Reply

MAX_RETRY_S = 5.0  # a Retry-After that is longer is cut to this
NUM_TRIES = 3  # of a request that is answered with 503 or not at all


class EngineStoppedError(PyserveError):
    """The engine has given up, so the lines that are left cannot be answered now."""


class BatchWork:
    """One run over the lines of `file` that have no answer in the journal.

    make_client     makes a client with which the server sends requests to itself.
    max_inflight    number of lines that are in flight at once.
    max_body_bytes  maximum size of a line's request body.
    check           called with each valid line before it is sent. Raises BadLineError to refuse
                    that line; any other exception ends the run.
    """

    def __init__(
        self, journal: Journal, file: BufferedReader, make_client: Callable[[], InnerClient], *,
        engine: EngineClient, max_inflight: int, max_body_bytes: int,
        check: Callable[[BatchLine], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self._journal = journal
        self._make_client = make_client
        self._engine = engine
        self._max_inflight = max_inflight
        self._max_body_bytes = max_body_bytes
        self._check = check
        self._lines: Iterator[tuple[int, bytes]] = lines_of(
            file, max_bytes=max_line_bytes(max_body_bytes)
        )
        self._read: deque[tuple[int, bytes]] = deque()  # lines that were read and not sent yet
        self._reading = asyncio.Lock()

    async def run(self) -> None:
        """Run until every line has an answer that is on disk.

        Raises JournalError, EngineStoppedError, and what `check` raises to end the run.
        """
        tasks = [asyncio.ensure_future(self._work()) for _ in range(self._max_inflight)]
        working = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
        syncing = asyncio.ensure_future(self._sync())
        try:
            await asyncio.wait([working, syncing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            for task in (syncing, *tasks):
                task.cancel()
            await asyncio.wait([syncing, *tasks])
        for task in (syncing, *tasks):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        await asyncio.to_thread(self._journal.sync)

    async def _work(self) -> None:
        client = self._make_client()
        try:
            while (found := await self._next()) is not None:
                await self._answer(client, *found)
        finally:
            client.close()

    async def _next(self) -> tuple[int, bytes] | None:
        """The number and the bytes of the next line without an answer; None at the end."""
        async with self._reading:
            while not self._read:
                more = await asyncio.to_thread(some_lines, self._lines)
                if not more:
                    return None
                self._read += [line for line in more if not self._journal.is_done(line[0])]
            return self._read.popleft()

    async def _answer(self, client: InnerClient, number: int, data: bytes) -> None:
        request_id = f"batch-{secrets.token_hex(16)}"
        try:
            line = read_line(data, max_body_bytes=self._max_body_bytes)
            self._check(line)
        except BadLineError as error:
            self._journal.put(number, refusal(error, request_id), has_failed=True)
            return
        reply = await self._ask(client, line, request_id)
        answer = answer_of(line, request_id, reply)
        self._journal.put(number, answer, has_failed=reply.status != 200)

    async def _ask(self, client: InnerClient, line: BatchLine, request_id: str) -> Reply:
        num_tries = 0
        while True:
            reply = await client.post(line.url, bytes(line.body), id=request_id)
            num_tries += reply.status != 429
            failure = self._engine.stats().error
            if reply.status >= 500 and failure is not None:
                raise EngineStoppedError(failure)
            is_tried_again = reply.status == 503 and num_tries < NUM_TRIES
            if reply.status not in (0, 429) and not is_tried_again:
                return reply
            if num_tries >= NUM_TRIES:
                raise EngineStoppedError(f"the server does not answer itself: {reply.error}")
            await asyncio.sleep(min(reply.retry_after_s or 1, MAX_RETRY_S))

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(FSYNC_S)
            await asyncio.to_thread(self._journal.sync)
