"""Run a Job and send its answer, streamed or whole; shared by every endpoint that uses the engine.

A `Dialect` defines how an endpoint writes its answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.body import ignored_header, merged_header
from pyserve.api.generation import stream
from pyserve.api.generation.beam import BeamGeneration
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import Job
from pyserve.api.http.delivery import json_response
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.http.keys import CLIENT, IS_BACKGROUND, USER
from pyserve.api.http.request_id import current as current_request_id
from pyserve.api.state import STATE, ServerState
from pyserve.client import Adapter, EngineClient
from pyserve.errors import AbortedError, UnavailableError
from pyserve.text.parts import num_chars

CLAMPED_HEADER = "x-pyserve-clamped"
LAST_WRITE_S = 10.0  # time for the client to read the error of a request that took too long
# The cost of encoding an answer is estimated in characters of text.
TOKEN_CHARS = 512  # for a token with its logprobs
NUMBER_CHARS = 16  # for one number of an embedding
SHORT_ANSWER = 2**17  # an answer of up to this size is encoded on the event loop: a millisecond


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that all objects of one answer share; `created` is in seconds since 1970."""

    id: str
    created: int
    model: str


def _no_frames(head: Head, job: Job) -> stream.Frames:
    raise AssertionError("it is not streamed")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one endpoint writes its answers.

    id_prefix  begins the id of every answer.
    whole      encodes a complete answer as JSON.
    frames     makes the encoder of a stream; left out by endpoints that never stream.
    keep       called with the JSON of a complete answer before it is sent, to store it.
    """

    id_prefix: str
    whole: Callable[[Head, Generation], bytes]
    frames: Callable[[Head, Job], stream.Frames] = _no_frames
    keep: Callable[[Head, bytes], None] = lambda head, data: None


class _Deadline:
    """Ends a request that takes longer than `timeout_s`; 0 means no limit.

    The generation then fails with UnavailableError. If the request has still not ended LAST_WRITE_S
    later, as its client does not read, `cut` is called.
    """

    def __init__(self, generation: Generation, timeout_s: float, cut: Callable[[], None]) -> None:
        self._generation = generation
        self._timeout_s = timeout_s
        self._cut = cut
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._interrupt)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self) -> None:
        reason = f"the request has taken longer than {self._timeout_s:g} s (--request-timeout)"
        self._generation.interrupt(UnavailableError(reason))
        self._timer = asyncio.get_running_loop().call_later(LAST_WRITE_S, self._cut)


def _size(choice: Choice) -> int:
    """The estimated cost of encoding a choice as JSON, in characters of text."""
    num_tokens = sum(len(part.tokens) for part in choice.parts)
    if choice.words is not None:
        num_tokens += len(choice.stream.prompt_logprobs)
    num_numbers = 0 if choice.stream.pooled is None else len(choice.stream.pooled)
    return num_chars(choice.parts) + TOKEN_CHARS * num_tokens + NUMBER_CHARS * num_numbers


@asynccontextmanager
async def generating(
    request: web.Request,
    engine: EngineClient,
    job: Job,
    *,
    arrived_s: float,
    cut: Callable[[], None],
) -> AsyncIterator[Generation]:
    """Submit `job`; on leaving the context abort what still runs, and update metrics and log.

    arrived_s  when the request arrived, on time.monotonic's clock.
    cut        called if the request has not ended LAST_WRITE_S after its time limit.

    Raises RequestError if the job is refused.
    """
    state = request.app[STATE]
    if request.get(IS_BACKGROUND):
        job = msgspec.structs.replace(job, is_background=True)
    kind = Generation if job.beam is None else BeamGeneration
    generation = kind(engine, state.metrics, arrived_s=arrived_s)
    reason = "abort"
    deadline = _Deadline(generation, state.config.request_timeout_s, cut)
    adapter = None
    try:
        adapter = await _acquired(state, engine, job)
        salt = state.keys.cache_salt(request[USER], job.cache_salt)
        await generation.submit(job, cache_salt=salt, user=request[CLIENT], adapter=adapter)
        state.generations[generation] = {job.request_id, current_request_id.get()} - {""}
        state.request_log.arrived(request, generation)
        yield generation
    except (AbortedError, ConnectionError):
        raise  # the operator has aborted the request or the client has disconnected: "abort"
    except Exception:
        reason = "error"
        raise
    finally:
        deadline.cancel()
        generation.close(reason)
        if adapter is not None and engine.adapters is not None:
            engine.adapters.release(adapter)
        state.generations.pop(generation, None)
        if generation.choices:
            usage = generation.usage()
            state.metrics.observe_usage(
                request[USER],
                num_prompt_tokens=usage.prompt_tokens,
                num_output_tokens=usage.completion_tokens,
            )
        state.request_log.ended(request, generation)


async def _acquired(state: ServerState, engine: EngineClient, job: Job) -> Adapter | None:
    """Acquire the adapter version that all sequences of `job` use; None for the base model."""
    name = state.adapter_named(job.model)
    if name is None or engine.adapters is None or not job.is_run:
        return None
    return await engine.adapters.acquire(name)


async def answer(
    request: web.Request, engine: EngineClient, job: Job, dialect: Dialect, *, arrived_s: float
) -> web.StreamResponse:
    """Run `job` and answer the request. Raises RequestError before the HTTP status is sent."""
    head = make_head(request, job, dialect.id_prefix)
    headers = answer_headers(job)

    def cut() -> None:
        if request.transport is not None:
            request.transport.abort()

    running = generating(request, engine, job, arrived_s=arrived_s, cut=cut)
    async with running as generation:
        if not job.is_run:  # it bypasses the engine's queue, so its size is checked here
            num_echoed = sum(len(choice.prefix) for choice in generation.choices)
            connection_of(request).check_unread(num_echoed)
        if job.is_streamed:
            live = stream.Live(generation, dialect.frames(head, job))
            return await stream.send(request, live, headers=headers)
        await generation.read_all()
    data = await encode_whole(request, generation, partial(dialect.whole, head, generation))
    dialect.keep(head, data)
    return json_response(data, headers)


def make_head(request: web.Request, job: Job, id_prefix: str) -> Head:
    """The Head of the answer to `job`."""
    return Head(
        id=id_prefix + (job.request_id or current_request_id.get()),
        created=int(time.time()),
        model=request.app[STATE].name_in_answers(job.model),
    )


def answer_headers(job: Job) -> dict[str, str]:
    """The response headers that report ignored fields, merged messages and a clamped limit."""
    headers = ignored_header(job.ignored) | merged_header(job.merged)
    if job.clamped:
        headers[CLAMPED_HEADER] = job.clamped
    return headers


async def encode_whole(
    request: web.Request, generation: Generation, encode: Callable[[], bytes]
) -> bytes:
    """Encode a generation that has ended with `encode`, on a worker thread if that takes long."""
    size = sum(map(_size, generation.choices))
    state = request.app[STATE]
    return await state.run_text(request, size, encode, short=SHORT_ANSWER, is_answer=True)
