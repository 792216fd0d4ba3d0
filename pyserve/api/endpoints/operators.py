"""What the operator of a server asks of it."""

from __future__ import annotations

import re

from aiohttp import web

from pyserve.api.endpoints.body import Wire, ignored_header
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE, ServerState
from pyserve.api.wire.protocol import AbortRequest
from pyserve.errors import AbortedError, InvalidRequestError
from pyserve.log import get_logger
from pyserve.words import counted

ABORT = Wire(AbortRequest)
TAGS = {"weights", "kv_cache"}  # of /wake_up
# What answers put before the id of their request.
_PREFIX = re.compile(r"(chatcmpl-|cmpl-|msg_|resp_)")


async def reset_prefix_cache(request: web.Request) -> web.StreamResponse:
    """Forget what prompts have left; running requests go on with the blocks that they have."""
    _check_page(request)
    request.app[STATE].model().engine.reset_prefix_cache()
    return json_response({"success": True})


async def abort_requests(request: web.Request) -> web.StreamResponse:
    """End requests that run or wait: those of `request_ids`, or all where none are named.

    An id is that of an answer, or the one that X-Request-Id tells. The lines of a batch are
    requests, too: those that have begun fail, those behind them are asked in their turn.
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
    """Give memory back and answer when it is: what runs is kept, as in vLLM's mode=keep, and goes
    on after /wake_up; what comes meanwhile waits in the queue. mode=abort ends what runs first.
    """
    _check_page(request)
    engine = request.app[STATE].model().engine
    level = _one_of(request, "level", "1", ("1", "2"))
    if _one_of(request, "mode", "keep", ("keep", "abort")) == "abort":
        _abort(request.app[STATE], set())
    await engine.sleep(int(level))
    return json_response({"status": "sleeping", "level": engine.stats().sleep_level})


async def wake_up(request: web.Request) -> web.StreamResponse:
    """Take the memory again and answer when it is there."""
    _check_page(request)
    engine = request.app[STATE].model().engine
    tags = request.query.getall("tags", [])
    if tags and set(tags) != TAGS:
        raise InvalidRequestError(
            "tags must be weights and kv_cache, both, or left out: one alone is not supported",
            "tags",
        )
    await engine.wake_up()
    return json_response({"status": "awake", "tags": tags or None})


async def is_sleeping(request: web.Request) -> web.StreamResponse:
    """Whether it does, at any level."""
    engine = request.app[STATE].model().engine
    return json_response({"is_sleeping": engine.stats().sleep_level > 0})


def _one_of(request: web.Request, name: str, default: str, values: tuple[str, ...]) -> str:
    value = request.query.get(name, default)
    if value not in values:
        raise InvalidRequestError(f"{name} must be {' or '.join(values)}, got {value[:50]}", name)
    return value


def _abort(state: ServerState, wanted: set[str]) -> int:
    """End the requests of these ids, all of them where there are none; how many."""
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
    """A request without a body needs no leave of the server's, as cors.py has it."""
    if is_foreign_page(request):
        raise InvalidRequestError(f"a page of another host may not ask for {request.path}")
