"""POST /v1/responses: items -> Job, parts -> items and events."""

from __future__ import annotations

import time
import uuid
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import SHORT_BODY_BYTES, Wire
from pyserve.api.endpoints.chat_job import chat_job
from pyserve.api.endpoints.responses_answer import (
    ID_PREFIX,
    Answering,
    ResponseFrames,
    encode_response,
)
from pyserve.api.endpoints.responses_request import Asked, own_items, read_request
from pyserve.api.generation.job import Job
from pyserve.api.http.uploads import NUM_BODY_BYTES
from pyserve.api.state import STATE, Loaded, ServerState
from pyserve.api.wire.responses import ResponsesRequest

WIRE = Wire(ResponsesRequest)


async def create_response(request: web.Request) -> web.StreamResponse:
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    read = partial(read_request, body, [], own_items(body.input))
    asked = await state.run_text(request, request[NUM_BODY_BYTES], read, short=SHORT_BODY_BYTES)
    with asked.renamed.errors():
        job = await _job(request, state, loaded, asked, ignored)
        params = job.params[0]
        answering = Answering(asked, params.temperature, params.top_p, False, _forget)
        dialect = Dialect(
            id_prefix=ID_PREFIX,
            frames=partial(ResponseFrames, answering),
            whole=partial(encode_response, answering),
        )
        return await answer(request, loaded.engine, job, dialect, arrived_s=arrived_s)


def _forget(head: Head, data: bytes) -> None:
    """Nothing is stored."""


async def _job(
    request: web.Request, state: ServerState, loaded: Loaded, asked: Asked, ignored: list[str]
) -> Job:
    """The Job of a response, in the words of this API."""
    ignored = [*ignored, *asked.ignored]
    job = await chat_job(request, state, loaded, asked.chat, ignored=ignored)
    return msgspec.structs.replace(
        job,
        request_id=uuid.uuid4().hex,  # nobody else can guess it, and no two are alike
        ignored=list(map(asked.renamed, job.ignored)),
        clamped=asked.renamed(job.clamped),
    )
