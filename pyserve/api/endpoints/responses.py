"""/v1/responses: create a response; retrieve, cancel or delete a stored one; list its input."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from operator import itemgetter

import msgspec
from aiohttp import web

from pyserve import any_json
from pyserve.api.endpoints import responses_background
from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import SHORT_BODY_BYTES, Wire, ignored_header, merged_header
from pyserve.api.endpoints.chat_job import chat_job
from pyserve.api.endpoints.query import part_of, read_query
from pyserve.api.endpoints.responses_answer import Answering, ResponseFrames, encode_response
from pyserve.api.endpoints.responses_history import (
    ID_PREFIX,
    History,
    gather,
    identified,
)
from pyserve.api.endpoints.responses_request import Asked, own_items, read_request
from pyserve.api.generation import stream
from pyserve.api.generation.job import Job
from pyserve.api.http.delivery import json_response
from pyserve.api.http.keys import USER
from pyserve.api.http.uploads import NUM_BODY_BYTES
from pyserve.api.state import STATE, Loaded, ServerState
from pyserve.api.store.responses import StoredResponse
from pyserve.api.wire.queries import InputItemsQuery, ResponseQuery
from pyserve.api.wire.responses import Object, ResponsesRequest
from pyserve.api.wire.responses_answer import Deleted, InputItems, InputTokens
from pyserve.errors import ContextError, InvalidRequestError, RequestError

WIRE = Wire(ResponsesRequest)


async def create_response(request: web.Request) -> web.StreamResponse:
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    is_kept = body.store is not False and state.responses.is_on
    if body.background and not is_kept:
        raise InvalidRequestError(
            "background needs store: true, and a server that stores responses "
            "(--response-store-size)",
            "background",
        )
    if body.store and not is_kept:
        ignored = [*ignored, "store"]
    hex_id = uuid.uuid4().hex  # random, so that nobody can guess the id of a stored response
    asked, given = await _read(request, state, body, ID_PREFIX + hex_id if is_kept else "")

    def keep(head: Head, data: bytes, events: Sequence[bytes] = ()) -> None:
        if is_kept:
            stored = StoredResponse(head.id, body.previous_response_id, data, given, events)
            state.responses.put(request[USER], stored)

    try:
        with asked.renamed.errors():
            job = await _job(request, state, loaded, asked, ignored)
    except ContextError as error:
        if not body.stream:
            raise
        state.request_log.refused(request, error)
        head = Head(ID_PREFIX + hex_id, int(time.time()), state.name_in_answers(body.model))
        temperature = 1.0 if body.temperature is None else body.temperature
        answering = Answering(asked, temperature, body.top_p or 1.0, is_kept, keep)
        headers = ignored_header(list(map(asked.renamed, [*ignored, *asked.ignored])))
        return await _send_failed(request, ResponseFrames(answering, head), error, headers)
    job = msgspec.structs.replace(job, request_id=hex_id)
    params = job.params[0]
    answering = Answering(asked, params.temperature, params.top_p, is_kept, keep)
    with asked.renamed.errors():
        if body.background:
            return await responses_background.start(
                request, loaded.engine, job, answering, given, arrived_s=arrived_s
            )
        dialect = Dialect(
            id_prefix=ID_PREFIX,
            frames=lambda head, job: ResponseFrames(answering, head),
            whole=partial(encode_response, answering),
            keep=keep,
        )
        return await answer(request, loaded.engine, job, dialect, arrived_s=arrived_s)


async def count_input_tokens(request: web.Request) -> web.StreamResponse:
    """Count the prompt tokens of a request without generating anything."""
    state = request.app[STATE]
    loaded = state.model()
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    asked, _ = await _read(request, state, body, "")
    with asked.renamed.errors():
        job = await _job(request, state, loaded, asked, ignored)
    count = InputTokens(input_tokens=len(job.prompts[0].token_ids))
    headers = ignored_header(job.ignored) | merged_header(job.merged)
    return json_response(count, headers)


async def retrieve_response(request: web.Request) -> web.StreamResponse:
    """A response, or, with ?stream=true, its events after number `starting_after`."""
    state, user, name = request.app[STATE], request[USER], request.match_info["response_id"]
    run = state.runs.get(user, name)
    query = read_query(request, ResponseQuery)
    if not query.stream:
        ignored = [] if query.starting_after is None else ["starting_after"]
        data = state.responses.get(user, name).answer if run is None else run.describe(run.status)
        return json_response(data, ignored_header(ignored))
    first = 0 if query.starting_after is None else query.starting_after + 1
    events = run.events if run is not None else state.responses.get(user, name).events
    if not events and not (run is not None and run.is_streamed):
        raise InvalidRequestError(
            "stream: only a response with background: true and stream: true is streamed again",
            "stream",
        )
    return await responses_background.follow(request, events, run, first=first)


async def delete_response(request: web.Request) -> web.StreamResponse:
    """Delete a stored response; one that still runs in the background is cancelled."""
    state, user, name = request.app[STATE], request[USER], request.match_info["response_id"]
    run = state.runs.get(user, name)
    if run is not None:
        run.is_wanted = False
        await run.cancel()
    else:
        state.responses.delete(user, name)
    return json_response(Deleted(id=name))


async def cancel_response(request: web.Request) -> web.StreamResponse:
    """Cancel a background response. One that has already ended is returned unchanged."""
    state, user, name = request.app[STATE], request[USER], request.match_info["response_id"]
    run = state.runs.get(user, name)
    if run is not None:
        await run.cancel()
    data = state.responses.get(user, name).answer
    if not msgspec.json.decode(data, type=_Kind).background:
        raise InvalidRequestError("Cannot cancel a synchronous response.", "response_id")
    return json_response(data)


async def list_input_items(request: web.Request) -> web.StreamResponse:
    """List the input items of a response, `limit` at a time, by default the newest first."""
    state, user, name = request.app[STATE], request[USER], request.match_info["response_id"]
    query = read_query(request, InputItemsQuery)
    run = state.runs.get(user, name)
    given = run.input if run is not None else state.responses.get(user, name).input

    def list_items() -> bytes:
        items: list[Object] = any_json.decode(given)
        items.reverse()
        return msgspec.json.encode(part_of(InputItems, items, itemgetter("id"), query))

    return json_response(
        await state.run_text(request, len(given), list_items, short=SHORT_BODY_BYTES)
    )


class _Kind(msgspec.Struct, frozen=True):
    """The one field of a stored response that `cancel_response` decodes."""

    background: bool


async def _read(
    request: web.Request, state: ServerState, body: ResponsesRequest, response_id: str
) -> tuple[Asked, bytes]:
    """Translate `body`, together with the stored responses that it builds on, into a chat.

    Returns it with the JSON of the request's own input items as they are stored; empty if
    `response_id` is, as the response is not stored then.

    Raises RequestError naming the field.
    """
    items = own_items(body)
    previous = body.previous_response_id
    if previous is not None and state.runs.get(request[USER], previous) is not None:
        raise InvalidRequestError(
            f"previous_response_id: {previous} runs in the background and has not ended",
            "previous_response_id",
        )
    history = gather(
        state.responses, request[USER], body, items, max_bytes=state.config.max_body_bytes
    )
    # The prompt includes the whole history, so its bytes count as if they were part of the body:
    # work on a long one is moved to a thread.
    request[NUM_BODY_BYTES] += history.num_bytes
    read = partial(_read_all, body, history, items, response_id)
    return await state.run_text(request, request[NUM_BODY_BYTES], read, short=SHORT_BODY_BYTES)


def _read_all(
    body: ResponsesRequest, history: History, items: Sequence[Object], response_id: str
) -> tuple[Asked, bytes]:
    own = history.resolve(items)
    asked = read_request(body, history.items(), own)
    return asked, msgspec.json.encode(identified(own, response_id)) if response_id else b""


async def _send_failed(
    request: web.Request, frames: ResponseFrames, error: RequestError, headers: dict[str, str]
) -> web.StreamResponse:
    """Answer 200 with a stream that fails before its first token.

    OpenAI's server reports a conversation that is too long like this. Agents then shorten the
    conversation and try again, whereas they would give up on a 400.
    """
    said = stream.Said(frames.begin() + frames.failed(error))
    return await stream.send(request, said, headers=headers)


async def _job(
    request: web.Request, state: ServerState, loaded: Loaded, asked: Asked, ignored: list[str]
) -> Job:
    """The Job of a request. The fields that it names are renamed to those of this API."""
    ignored = [*ignored, *asked.ignored]
    job = await chat_job(request, state, loaded, asked.chat, ignored=ignored)
    return msgspec.structs.replace(
        job,
        ignored=list(map(asked.renamed, job.ignored)),
        clamped=asked.renamed(job.clamped),
    )
