"""X-Request-Id: taken from the client or made here; sent in every response and logged."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

from aiohttp import web

HEADER = "X-Request-Id"
ANTHROPIC_HEADER = "request-id"  # where Anthropic's SDKs look for it
MAX_CHARS = 128
# Characters that are safe in log lines, headers and file names. An id with others is replaced and
# not refused, because proxies set this header too; the response says which id the request has got.
_SAFE = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_CHARS}}}")

# Id of the request that this task answers; a connection has one task and one request at a time.
current: ContextVar[str] = ContextVar("request_id", default="-")


def begin(request: web.BaseRequest) -> str:
    """Return the id of `request`, and make it the current one of this task."""
    given = request.headers.get(HEADER, "")
    request_id = given if _SAFE.fullmatch(given) else secrets.token_hex(16)
    current.set(request_id)
    return request_id
