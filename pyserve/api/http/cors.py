"""Cross-origin requests (CORS, WHATWG Fetch 3.2): which web pages may call this server.

The API uses no cookies: an API key travels in a header, and a page must know the key to send it.
So by default any page may call the server, as in vLLM; --allowed-origins restricts this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from pyserve.api.http import request_id
from pyserve.config import ServerConfig

METHODS = "GET, HEAD, POST"
EXPOSED = (
    "Retry-After, X-Request-Id, request-id, x-pyserve-clamped, x-pyserve-ignored, x-pyserve-merged"
)
MAX_AGE_S = 600

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_cors(app: web.Application, config: ServerConfig) -> None:
    """Add a middleware that answers preflight requests, and CORS headers to all other responses.

    The middleware comes before the check of API keys, as browsers send no key with a preflight.
    """
    policy = _Policy(config)

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_preflight = (
            request.method == hdrs.METH_OPTIONS
            and hdrs.ORIGIN in request.headers
            and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        )
        if not is_preflight:
            return await handler(request)
        request_id.begin(request)
        return policy.preflight(request)

    async def sign(request: web.Request, response: web.StreamResponse) -> None:
        # A middleware would be too late for streams: their headers are sent before the handler
        # returns.
        response.headers.update(policy.headers(request))

    app.middlewares.insert(0, preflight)
    app.on_response_prepare.append(sign)


def is_foreign_page(request: web.Request) -> bool:
    """Whether the Origin header names another host than the one the request was sent to."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return False
    return origin.partition("://")[2].lower() != request.headers.get(hdrs.HOST, "").lower()


class _Policy:
    def __init__(self, config: ServerConfig) -> None:
        self._any_origin = "*" in config.allowed_origins
        # Scheme and host are case-insensitive, and browsers send them in lower case.
        self._origins = frozenset(origin.lower() for origin in config.allowed_origins)
        self._methods = METHODS if "*" in config.allowed_methods else _join(config.allowed_methods)
        self._headers = None if "*" in config.allowed_headers else _join(config.allowed_headers)
        self._credentials = config.allow_credentials

    def headers(self, request: web.Request) -> dict[str, str]:
        """CORS headers of a response: no permission without an Origin, or for one not allowed."""
        origin = request.headers.get(hdrs.ORIGIN)
        if self._any_origin:
            return {} if origin is None else self._allow("*")
        # The response depends on the Origin, so caches must be told, even where none was sent.
        vary: dict[str, str] = {hdrs.VARY: hdrs.ORIGIN}
        if origin is None or origin.lower() not in self._origins:
            return vary
        return {**vary, **self._allow(origin)}

    def _allow(self, origin: str) -> dict[str, str]:
        allowed: dict[str, str] = {
            hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin,
            hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: EXPOSED,
        }
        if self._credentials:
            allowed[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
        return allowed

    def preflight(self, request: web.Request) -> web.Response:
        """A 204. Without CORS permission in its headers the browser sends no actual request."""
        response = web.Response(status=204)
        if hdrs.ACCESS_CONTROL_ALLOW_ORIGIN in self.headers(request):
            asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)
            headers = asked if self._headers is None else self._headers
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = self._methods
            response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = str(MAX_AGE_S)
            if headers:
                # "*" does not cover Authorization, so the requested headers are named instead.
                response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = headers
        return response


def _join(values: tuple[str, ...]) -> str:
    return ", ".join(values)
