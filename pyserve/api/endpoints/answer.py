"""A Job in, an answer out, streamed or whole: the same for every endpoint that generates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from pyserve.api.endpoints.body import ignored_header, merged_header
from pyserve.api.generation import stream
from pyserve.api.generation.beam import BeamGeneration
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import Job
from pyserve.api.http.delivery import json_response
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.http.keys import CLIENT, USER
from pyserve.api.http.request_id import current as current_request_id
from pyserve.api.state import STATE
from pyserve.client import EngineClient
from pyserve.errors import UnavailableError
from pyserve.text.parts import num_chars

CLAMPED_HEADER = "x-pyserve-clamped"
LAST_WRITE_S = 10.0  # for a client to take the error of a request that took too long
TOKEN_CHARS = 512  # what encoding the logprobs of a token takes
SHORT_ANSWER = 2**17  # characters encoded on the event loop: a millisecond


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer says; `created` is in seconds since 1970."""

    id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """The words of one endpoint's answers.

    frames  of a stream.
    whole   the JSON of a whole answer.
    keep    takes that JSON before it is sent.
    """

    id_prefix: str
    frames: Callable[[Head, Job], stream.Frames]
    whole: Callable[[Head, Generation], bytes]
    keep: Callable[[Head, bytes], None] = lambda head, data: None


class _Deadline:
    """Ends a request that takes longer than `timeout_s`, 0 for none: with an error that says so,
    and where the client does not even take that, with its connection.
    """

    def __init__(self, request: web.Request, generation: Generation, timeout_s: float) -> None:
        self._request = request
        self._generation = generation
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._interrupt)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self) -> None:
        reason = f"the request has taken longer than {self._timeout_s:g} s (--request-timeout)"
        self._generation.interrupt(UnavailableError(reason))
        self._timer = asyncio.get_running_loop().call_later(LAST_WRITE_S, self._abort)

    def _abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


def _size(choice: Choice) -> int:
    """What encoding a choice takes, in characters of text."""
    num_tokens = sum(len(part.tokens) for part in choice.parts)
    if choice.words is not None:
        num_tokens += len(choice.stream.prompt_logprobs)
    return num_chars(choice.parts) + TOKEN_CHARS * num_tokens


async def answer(
    request: web.Request, engine: EngineClient, job: Job, dialect: Dialect, *, arrived_s: float
) -> web.StreamResponse:
    """Run `job`. Raises RequestError before the status is sent."""
    state = request.app[STATE]
    head = Head(
        id=dialect.id_prefix + (job.request_id or current_request_id.get()),
        created=int(time.time()),
        model=state.model_name,
    )
    headers = ignored_header(job.ignored) | merged_header(job.merged)
    if job.clamped:
        headers[CLAMPED_HEADER] = job.clamped
    kind = Generation if job.beam is None else BeamGeneration
    generation = kind(engine, state.metrics, arrived_s=arrived_s)
    reason = "abort"
    deadline = _Deadline(request, generation, state.config.request_timeout_s)
    try:
        salt = state.keys.cache_salt(request[USER], job.cache_salt)
        await generation.submit(job, cache_salt=salt, user=request[CLIENT])
        if not job.is_run:  # no queue bounds it
            num_echoed = sum(len(choice.prefix) for choice in generation.choices)
            connection_of(request).check_unread(num_echoed)
        state.request_log.arrived(request, generation)
        if job.is_streamed:
            frames = dialect.frames(head, job)
            return await stream.send(request, generation, frames, headers=headers)
        await generation.read_all()
    except ConnectionError:
        raise  # the client has gone
    except Exception:
        reason = "error"
        raise
    finally:
        deadline.cancel()
        generation.close(reason)
        if generation.choices:
            usage = generation.usage()
            state.metrics.observe_usage(
                request[USER],
                num_prompt_tokens=usage.prompt_tokens,
                num_output_tokens=usage.completion_tokens,
            )
        state.request_log.ended(request, generation)
    size = sum(map(_size, generation.choices))
    encode = partial(dialect.whole, head, generation)
    data = await state.run_text(request, size, encode, short=SHORT_ANSWER, is_answer=True)
    dialect.keep(head, data)
    return json_response(data, headers)
