"""X-Request-Id: the client's own or one made here; in every response and in lines about errors."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

from aiohttp import web

HEADER = "X-Request-Id"
ANTHROPIC_HEADER = "request-id"  # where Anthropic's SDKs look for it
MAX_CHARS = 128
# What a log line, a header and a file name can all hold; anything else is replaced, not refused:
# proxies write this header too, and the answer says which id the request has got.
_SAFE = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_CHARS}}}")

# Of the request that this task answers: a connection has one task and one request at a time.
current: ContextVar[str] = ContextVar("request_id", default="-")


def begin(request: web.BaseRequest) -> str:
    """The id of `request`, from here on also the current one."""
    given = request.headers.get(HEADER, "")
    request_id = given if _SAFE.fullmatch(given) else secrets.token_hex(16)
    current.set(request_id)
    return request_id
