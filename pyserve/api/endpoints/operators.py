"""Endpoints for operators: reset the prefix cache, abort requests, sleep and wake up."""

from __future__ import annotations

import re

from aiohttp import web

from pyserve.api.endpoints.body import Wire, ignored_header
from pyserve.api.endpoints.query import read_query
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE, ServerState
from pyserve.api.wire.protocol import AbortRequest
from pyserve.api.wire.queries import SleepQuery, WakeUpQuery
from pyserve.errors import AbortedError, InvalidRequestError
from pyserve.log import get_logger
from pyserve.words import counted

ABORT = Wire(AbortRequest)
# The prefixes that turn the id of a request into the id of its answer.
_PREFIX = re.compile(r"(chatcmpl-|cmpl-|msg_|resp_)")


async def reset_prefix_cache(request: web.Request) -> web.StreamResponse:
    """Empty the prefix cache; running requests keep their blocks."""
    _check_page(request)
    request.app[STATE].model().engine.reset_prefix_cache()
    return json_response({"success": True})


async def abort_requests(request: web.Request) -> web.StreamResponse:
    """Abort running and waiting requests: those in `request_ids`, or all if that is empty.

    An id is that of an answer or of the header X-Request-Id. Each line of a batch is a request of
    its own: lines that have been started fail, and the lines after them are started as usual.
    """
    _check_page(request)
    state = request.app[STATE]
    state.model()
    wanted: set[str] = set()
    ignored: list[str] = []
    if request.can_read_body:
        body, ignored = await ABORT.read(request, state)
        wanted = {_PREFIX.sub("", id, count=1) for id in body.request_ids or ()}
        wanted |= set(body.request_ids or ())
    num_aborted = _abort(state, wanted)
    return json_response({"status": "aborted", "aborted": num_aborted}, ignored_header(ignored))


async def sleep(request: web.Request) -> web.StreamResponse:
    """Free device memory, and answer when it has been freed.

    Running requests are kept, as in vLLM's mode=keep, and continue after /wake_up; new ones wait in
    the queue. With mode=abort running requests are aborted first.
    """
    _check_page(request)
    engine = request.app[STATE].model().engine
    query = read_query(request, SleepQuery)
    if query.mode == "abort":
        _abort(request.app[STATE], set())
    await engine.sleep(query.level)
    return json_response({"status": "sleeping", "level": engine.stats().sleep_level})


async def wake_up(request: web.Request) -> web.StreamResponse:
    """Allocate the memory again, and answer when the engine is awake."""
    _check_page(request)
    engine = request.app[STATE].model().engine
    tags = read_query(request, WakeUpQuery).tags
    if len(set(tags)) == 1:
        raise InvalidRequestError(
            "tags must be weights and kv_cache, both, or left out: one alone is not supported",
            "tags",
        )
    await engine.wake_up()
    return json_response({"status": "awake", "tags": tags or None})


async def is_sleeping(request: web.Request) -> web.StreamResponse:
    """Whether the engine sleeps, at any level."""
    engine = request.app[STATE].model().engine
    return json_response({"is_sleeping": engine.stats().sleep_level > 0})


def _abort(state: ServerState, wanted: set[str]) -> int:
    """Abort the requests with ids in `wanted`, all if it is empty; returns how many there were."""
    aborted = [
        generation
        for generation, ids in list(state.generations.items())
        if generation.active and (not wanted or ids & wanted)
    ]
    for generation in aborted:
        generation.abort(AbortedError("the operator of this server has ended the request"))
    get_logger().info("%s aborted by /abort_requests", counted(len(aborted), "request"))
    return len(aborted)


def _check_page(request: web.Request) -> None:
    """Refuse requests of other hosts' web pages, for which browsers need no CORS preflight here."""
    if is_foreign_page(request):
        raise InvalidRequestError(f"a page of another host may not ask for {request.path}")
