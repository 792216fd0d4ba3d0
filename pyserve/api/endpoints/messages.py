"""POST /v1/messages and /v1/messages/count_tokens: chats through Anthropic's Messages API."""

from __future__ import annotations

import time
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.answer import answer
from pyserve.api.endpoints.body import SHORT_BODY_BYTES, Wire, ignored_header, merged_header
from pyserve.api.endpoints.chat_job import chat_job
from pyserve.api.endpoints.messages_answer import dialect
from pyserve.api.endpoints.messages_request import Read, read_request
from pyserve.api.generation.job import Job
from pyserve.api.http.delivery import json_response
from pyserve.api.http.uploads import NUM_BODY_BYTES
from pyserve.api.state import STATE, Loaded
from pyserve.api.wire.messages import CountTokensRequest, CountTokensResponse, MessagesRequest

MESSAGES = Wire(MessagesRequest)
COUNT_TOKENS = Wire(CountTokensRequest)


async def messages(request: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await MESSAGES.read(request, state)
    state.check_model_name(body.model)
    read, job = await _job(request, loaded, body, ignored)
    return await answer(request, loaded.engine, job, dialect(read), arrived_s=arrived_s)


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """Count the prompt tokens of a request without generating anything."""
    state = request.app[STATE]
    loaded = state.model()
    body, ignored = await COUNT_TOKENS.read(request, state)
    state.check_model_name(body.model)
    _, job = await _job(request, loaded, body, ignored)
    count = CountTokensResponse(len(job.prompts[0].token_ids))
    headers = ignored_header(job.ignored) | merged_header(job.merged)
    return json_response(msgspec.json.encode(count), headers)


async def _job(
    request: web.Request, loaded: Loaded, body: CountTokensRequest, ignored: list[str]
) -> tuple[Read, Job]:
    """Read the request and make its Job. Raises RequestError naming fields of `body`."""
    state = request.app[STATE]
    defaults = state.config.default_chat_template_kwargs or {}
    make = partial(read_request, body, loaded, defaults, ignored)
    read = await state.run_text(request, request[NUM_BODY_BYTES], make, short=SHORT_BODY_BYTES)
    with read.renamed.errors():
        job = await chat_job(request, state, loaded, read.chat, ignored=ignored)
    return read, msgspec.structs.replace(job, ignored=list(map(read.renamed, job.ignored)))
