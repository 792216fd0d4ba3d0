"""What the operator of a server asks of it."""

from __future__ import annotations

import re

from aiohttp import web

from pyserve.api.endpoints.body import Wire, ignored_header
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE
from pyserve.api.wire.protocol import AbortRequest
from pyserve.errors import AbortedError, InvalidRequestError
from pyserve.log import get_logger
from pyserve.words import counted

ABORT = Wire(AbortRequest)
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
    aborted = [
        generation
        for generation, id in list(state.generations.items())
        if generation.active and (not wanted or id in wanted)
    ]
    for generation in aborted:
        generation.abort(AbortedError("the operator of this server has ended the request"))
    get_logger().info("%s aborted by /abort_requests", counted(len(aborted), "request"))
    return json_response({"status": "aborted", "aborted": len(aborted)}, ignored_header(ignored))


def _check_page(request: web.Request) -> None:
    """A request without a body needs no leave of the server's, as cors.py has it."""
    if is_foreign_page(request):
        raise InvalidRequestError(f"a page of another host may not ask for {request.path}")
