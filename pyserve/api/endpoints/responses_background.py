"""Background responses: generated without a connected client, and polled, streamed or cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.answer import (
    Head,
    answer_headers,
    encode_whole,
    generating,
    make_head,
)
from pyserve.api.endpoints.responses_answer import Answering, ResponseFrames, encode_response
from pyserve.api.endpoints.responses_history import ID_PREFIX
from pyserve.api.generation import stream
from pyserve.api.generation.generate import Generation
from pyserve.api.generation.job import Job
from pyserve.api.http.delivery import json_response
from pyserve.api.http.errors import log_unexpected
from pyserve.api.http.keys import CLIENT, USER
from pyserve.api.state import STATE
from pyserve.api.store.background import Run
from pyserve.client import EngineClient
from pyserve.errors import RequestError, release_frames

NUM_AT_ONCE = 256  # maximum number of stored events that are sent in one write
_END = b"\n\n"


async def start(
    request: web.Request,
    engine: EngineClient,
    job: Job,
    answering: Answering,
    given: bytes,
    *,
    arrived_s: float,
) -> web.StreamResponse:
    """Run `job` in the background, and answer with its queued response or, streamed, its events.

    given  the request's own input items, as the JSON list that is stored.

    Raises RequestError if the job is refused.
    """
    request.app[STATE].runs.check_room(request[CLIENT])
    head = make_head(request, job, ID_PREFIX)

    def describe(status: str) -> bytes:
        return msgspec.json.encode(answering.response(head, [], status=status))

    run = Run(head.id, request[USER], request[CLIENT], given, describe, job.is_streamed)
    work = _Work(request, engine, job, answering, head, run)
    run.task = asyncio.create_task(work.do(arrived_s))
    await asyncio.shield(work.started)
    headers = answer_headers(job)
    if job.is_streamed:
        return await follow(request, run.events, run, headers=headers)
    return json_response(describe("queued"), headers)


class _Work:
    """The task of one background response, from its submission to its end.

    started  done when the job's sequence is queued; has the exception if the job is refused.
    """

    def __init__(
        self,
        request: web.Request,
        engine: EngineClient,
        job: Job,
        answering: Answering,
        head: Head,
        run: Run,
    ) -> None:
        self._request, self._engine, self._job = request, engine, job
        self._state = request.app[STATE]
        self._head, self._run = head, run
        self._store = answering.keep
        self._answering = replace(answering, keep=self._keep)
        self._frames = ResponseFrames(self._answering, head)
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # If the client disconnects before this is done, nobody awaits the future. Retrieving the
        # exception here keeps asyncio from logging it as never retrieved.
        self.started.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def do(self, arrived_s: float) -> None:
        """Generate the response and store it.

        An error before `started` is done is raised to the client by `start`; a later one becomes
        the failed response.
        """
        run = self._run
        self._state.enter()
        try:
            await self._generate(arrived_s)
        except asyncio.CancelledError:
            pass  # _generate has already kept the cancelled response
        except Exception as error:
            known = error if isinstance(error, RequestError) else log_unexpected(error)
            if not self.started.done():
                self.started.set_exception(known)
            else:
                self._append(self._frames.failed(known))
            release_frames(error)
        finally:
            self._state.leave()
            if self._state.runs.get(run.user, run.id) is run:
                self._state.runs.remove(run)
                if run.answer and run.is_wanted:
                    self._store(self._head, run.answer, run.events)

    async def _generate(self, arrived_s: float) -> None:
        run, job = self._run, self._job
        running = generating(self._request, self._engine, job, arrived_s=arrived_s, cut=run.wake)
        async with running as generation:
            first = generation.choices[0].stream
            run.has_begun = lambda: first.scheduled_s > 0.0
            self._state.runs.add(run)
            self.started.set_result(None)
            try:
                if job.is_streamed:
                    await self._gather_events(generation)
                    return
                await generation.read_all()
                encode = partial(encode_response, self._answering, self._head, generation)
                self._keep(self._head, await encode_whole(self._request, generation, encode))
            except asyncio.CancelledError:
                generation.close("abort")
                self._keep(self._head, self._cancelled(generation))
                raise

    async def _gather_events(self, generation: Generation) -> None:
        live = stream.Live(generation, self._frames)
        while not live.is_over:
            self._append(await live.read())
            try:
                self._state.runs.check_events(self._run)
            except RequestError as error:
                if not live.is_over:
                    self._append(live.fail(error))

    def _append(self, data: bytes) -> None:
        if self._run.is_streamed:
            frames = data.split(_END)[:-1]
            self._state.runs.append(self._run, [frame + _END for frame in frames])

    def _cancelled(self, generation: Generation) -> bytes:
        """The JSON of the response with what was generated before it was cancelled."""
        if self._job.is_streamed:
            return self._frames.cancelled(generation.usage())
        return encode_response(self._answering, self._head, generation)

    def _keep(self, head: Head, data: bytes, events: Sequence[bytes] = ()) -> None:
        """Note the final JSON; `do` stores it with the events, after the last one was appended."""
        self._run.answer = data


async def follow(
    request: web.Request,
    events: Sequence[bytes],
    run: Run | None,
    *,
    first: int = 0,
    headers: dict[str, str] | None = None,
) -> web.StreamResponse:
    """Stream the events of a background response, starting with event number `first`.

    events   the events so far; a running response appends to this list.
    run      the response that still generates; None if it has ended.
    headers  added to those of the stream.
    """
    follower = _Follower(events, run, first)
    if run is not None:
        run.readers.add(follower.news)
    try:
        return await stream.send(request, follower, headers=headers or {})
    finally:
        if run is not None:
            run.readers.discard(follower.news)


class _Follower:
    """Implements stream.Source: the stored events of a response, then new ones as they come."""

    def __init__(self, events: Sequence[bytes], run: Run | None, first: int) -> None:
        self.is_over = False
        self.news = asyncio.Event()
        self._events = events
        self._run = run
        self._next = first

    async def read(self) -> bytes:
        """Up to NUM_AT_ONCE further events; waits if there are none, and may return b"" then."""
        run = self._run
        if self._next >= len(self._events):
            if run is None or run.is_over:
                self.is_over = True
                return b""
            await self.news.wait()
        self.news.clear()
        events = self._events[self._next : self._next + NUM_AT_ONCE]
        self._next += len(events)
        return b"".join(events)

    def wake(self) -> None:
        """Let `read` return."""
        self.news.set()

    def keep_alive(self) -> bytes:
        """A comment, which clients ignore."""
        return stream.COMMENT

    def fail(self, error: Exception) -> bytes:
        """End this stream because its client reads too slowly; the response continues to run."""
        self.is_over = True
        return b""
