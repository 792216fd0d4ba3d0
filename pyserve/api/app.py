"""Routes and the one middleware: who may ask, what an error looks like, what is in flight.

A route is denied without a key unless its row says `is_public`; that includes paths that do not
exist. Every response but a finished answer is an error object of errors.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from pyserve import __version__
from pyserve.api.chat import chat_completions
from pyserve.api.completions import completions
from pyserve.api.cors import add_cors
from pyserve.api.errors import error_response, log_unexpected
from pyserve.api.models import list_models, retrieve_model
from pyserve.api.state import STATE, Keys, ServerState
from pyserve.api.tokens import detokenize, tokenize
from pyserve.errors import (
    MethodNotAllowedError,
    NotFoundError,
    RequestError,
    UnauthorizedError,
)
from pyserve.metrics import CONTENT_TYPE

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler
    is_public: bool = False
    uses_model: bool = False


async def health(request: web.Request) -> web.StreamResponse:
    """200 where a request would be taken now; else 503 and where the server stands."""
    state = request.app[STATE]
    if state.status == "starting":
        return _json(503, {"status": "starting", **state.startup.describe()})
    if state.status == "draining":
        return _json(503, {"status": "draining"})
    assert state.loaded is not None
    # The engine itself is asked: serve.py learns of its end a moment later.
    if state.loaded.engine.stats().error is not None:
        return _json(503, {"status": "failed"})
    return _json(200, {"status": "ready"})


async def version(request: web.Request) -> web.StreamResponse:
    """The version of pyserve."""
    return _json(200, {"version": __version__})


async def metrics(request: web.Request) -> web.StreamResponse:
    """Prometheus text."""
    return web.Response(
        body=request.app[STATE].metrics.render(), headers={"Content-Type": CONTENT_TYPE}
    )


ROUTES = (
    Route("POST", "/v1/chat/completions", chat_completions, uses_model=True),
    Route("POST", "/v1/completions", completions, uses_model=True),
    Route("GET", "/v1/models", list_models),
    Route("GET", "/v1/models/{model:.+}", retrieve_model),
    Route("POST", "/tokenize", tokenize, uses_model=True),
    Route("POST", "/detokenize", detokenize, uses_model=True),
    Route("GET", "/version", version),
    Route("GET", "/metrics", metrics),
    Route("GET", "/health", health, is_public=True),
    Route("GET", "/ping", health, is_public=True),
    Route("POST", "/ping", health, is_public=True),
)


def build_app(state: ServerState) -> web.Application:
    """The application of one server; it lives as long as `state`."""
    app = web.Application(
        middlewares=[_middleware(state)], client_max_size=state.config.max_body_bytes
    )
    app[STATE] = state
    app.on_response_prepare.append(_sign)
    add_cors(app, state.config)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)
    return app


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "pyserve"  # aiohttp would name itself and Python, with versions


def _middleware(state: ServerState) -> Middleware:
    keys = Keys(state.config.api_keys)
    public = {route.handler for route in ROUTES if route.is_public}
    using_model = {route.handler for route in ROUTES if route.uses_model}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        target = request.match_info.handler
        try:
            if target not in public and not keys.accept(request):
                raise UnauthorizedError("the API key is missing or wrong")
            if target not in using_model:
                return await handler(request)
            state.enter()
            try:
                return await handler(request)
            finally:
                state.leave()
        except RequestError as error:
            response = error_response(error)
        except web.HTTPException as error:
            response = _router_error(request, error)
        except ConnectionError:
            raise  # the client has gone; aiohttp closes what is left
        except Exception as error:
            response = error_response(log_unexpected(error))
        if state.status in ("draining", "failed"):
            response.force_close()
        return response

    return guard


def _router_error(request: web.Request, error: web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPMethodNotAllowed):
        response = error_response(
            MethodNotAllowedError(f"{request.method[:20]} is not allowed on this path")
        )
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    if isinstance(error, web.HTTPNotFound):
        return error_response(NotFoundError("no such path"))
    return error_response(log_unexpected(error))


def _json(status: int, value: dict[str, object]) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )
