"""What the operator of a server asks of it."""

from __future__ import annotations

from aiohttp import web

from pyserve.api.http.cors import is_foreign_page
from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE
from pyserve.errors import InvalidRequestError


async def reset_prefix_cache(request: web.Request) -> web.StreamResponse:
    """Forget what prompts have left; running requests go on with the blocks that they have."""
    if is_foreign_page(request):  # a request without a body needs no leave of the server's: cors.py
        raise InvalidRequestError("a page of another host may not reset the prefix cache")
    request.app[STATE].model().engine.reset_prefix_cache()
    return json_response({"success": True})
