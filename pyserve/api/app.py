"""The application: its routes, and the middleware that checks keys and turns errors into responses.

A request without a valid API key is refused unless its route is marked `is_public`. That includes
paths that do not exist, because the check looks at the handler that the router found and never at
the text of the path. Errors have the format of their route, and every response has a request id.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Middleware

from pyserve import __version__
from pyserve.api.endpoints.adapters import load_adapter, unload_adapter
from pyserve.api.endpoints.batches import (
    cancel_batch,
    create_batch,
    list_batches,
    retrieve_batch,
)
from pyserve.api.endpoints.chat import chat_completions
from pyserve.api.endpoints.completions import completions
from pyserve.api.endpoints.embeddings import embeddings
from pyserve.api.endpoints.files import (
    delete_file,
    file_content,
    list_files,
    retrieve_file,
    upload_file,
)
from pyserve.api.endpoints.health import health, health_live
from pyserve.api.endpoints.messages import count_tokens, messages
from pyserve.api.endpoints.messages_answer import error_body as messages_error
from pyserve.api.endpoints.models import list_models, retrieve_model
from pyserve.api.endpoints.operators import (
    abort_requests,
    is_sleeping,
    reset_prefix_cache,
    sleep,
    wake_up,
)
from pyserve.api.endpoints.query import name_unknown_parameters
from pyserve.api.endpoints.responses import (
    cancel_response,
    count_input_tokens,
    create_response,
    delete_response,
    list_input_items,
    retrieve_response,
)
from pyserve.api.endpoints.scores import rerank, score
from pyserve.api.endpoints.tokens import detokenize, tokenize
from pyserve.api.http import request_id
from pyserve.api.http.cors import add_cors
from pyserve.api.http.delivery import deliver, json_response
from pyserve.api.http.errors import ErrorBody, error_body, error_response, log_unexpected
from pyserve.api.http.http_metrics import STATUS
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.http.inner import client_of
from pyserve.api.http.keys import CLIENT, IS_BACKGROUND, USER
from pyserve.api.pages import site
from pyserve.api.pages.openapi import DOCUMENT, Document, openapi
from pyserve.api.pages.unknown_paths import UnknownPaths
from pyserve.api.state import STATE, ServerState
from pyserve.errors import RequestError, UnauthorizedError, release_frames
from pyserve.metrics import CONTENT_TYPE

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    """One route.

    is_public    it needs no API key.
    is_of_model  its requests use the model, so they are counted and the shutdown waits for them.
    error_body   formats an error as clients of the route expect it; by default as OpenAI does.
    """

    method: str
    path: str
    handler: Handler
    is_public: bool = False
    is_of_model: bool = False
    error_body: ErrorBody = error_body


async def version(request: web.Request) -> web.StreamResponse:
    """The version of pyserve."""
    return json_response({"version": __version__})


async def load(request: web.Request) -> web.StreamResponse:
    """Number of requests in flight, under vLLM's name."""
    return json_response({"server_load": request.app[STATE].num_in_flight})


async def metrics(request: web.Request) -> web.StreamResponse:
    """All metrics in Prometheus' text format."""
    return web.Response(
        body=request.app[STATE].metrics.render(), headers={"Content-Type": CONTENT_TYPE}
    )


ROUTES = (
    Route("POST", "/v1/chat/completions", chat_completions, is_of_model=True),
    Route("POST", "/v1/completions", completions, is_of_model=True),
    Route("POST", "/v1/responses", create_response, is_of_model=True),
    Route("POST", "/v1/messages", messages, is_of_model=True, error_body=messages_error),
    Route(
        "POST", "/v1/messages/count_tokens", count_tokens, is_of_model=True,
        error_body=messages_error,
    ),
    Route("POST", "/v1/embeddings", embeddings, is_of_model=True),
    Route("POST", "/v1/rerank", rerank, is_of_model=True),
    Route("POST", "/v2/rerank", rerank, is_of_model=True),
    Route("POST", "/rerank", rerank, is_of_model=True),
    Route("POST", "/v1/score", score, is_of_model=True),
    Route("POST", "/score", score, is_of_model=True),
    Route("POST", "/v1/responses/input_tokens", count_input_tokens, is_of_model=True),
    Route("GET", "/v1/responses/{response_id}", retrieve_response),
    Route("DELETE", "/v1/responses/{response_id}", delete_response),
    Route("POST", "/v1/responses/{response_id}/cancel", cancel_response),
    Route("GET", "/v1/responses/{response_id}/input_items", list_input_items),
    Route("POST", "/v1/files", upload_file),
    Route("GET", "/v1/files", list_files),
    Route("GET", "/v1/files/{file_id}", retrieve_file),
    Route("DELETE", "/v1/files/{file_id}", delete_file),
    Route("GET", "/v1/files/{file_id}/content", file_content),
    Route("POST", "/v1/batches", create_batch),
    Route("GET", "/v1/batches", list_batches),
    Route("GET", "/v1/batches/{batch_id}", retrieve_batch),
    Route("POST", "/v1/batches/{batch_id}/cancel", cancel_batch),
    Route("GET", "/v1/models", list_models),
    Route("GET", "/v1/models/{model:.+}", retrieve_model),
    Route("POST", "/v1/load_lora_adapter", load_adapter),
    Route("POST", "/v1/unload_lora_adapter", unload_adapter),
    Route("POST", "/tokenize", tokenize, is_of_model=True),
    Route("POST", "/detokenize", detokenize, is_of_model=True),
    Route("POST", "/reset_prefix_cache", reset_prefix_cache),
    Route("POST", "/abort_requests", abort_requests),
    Route("POST", "/sleep", sleep),
    Route("POST", "/wake_up", wake_up),
    Route("GET", "/is_sleeping", is_sleeping),
    Route("GET", "/version", version),
    Route("GET", "/load", load),
    Route("GET", "/metrics", metrics),
    Route("GET", "/health", health, is_public=True),
    Route("GET", "/health/live", health_live, is_public=True),
    Route("GET", "/health/ready", health, is_public=True),
    Route("GET", "/ping", health, is_public=True),
    Route("POST", "/ping", health, is_public=True),
    Route("GET", "/", site.index, is_public=True),
    Route("GET", "/docs", site.docs, is_public=True),
    # It is the same for every server of this version, so there is nothing to hide. It must be
    # public because /docs fetches it without a key.
    Route("GET", "/openapi.json", openapi, is_public=True),
    Route("GET", site.STATIC_PATH, site.static, is_public=True),
)  # fmt: skip
PAGES = (site.index, site.docs)
_ANTHROPIC = tuple(f"{route.path}/" for route in ROUTES if route.error_body is messages_error)


def build_app(state: ServerState) -> web.Application:
    """Make the application of the server whose state is `state`."""
    app = web.Application(middlewares=[_middleware(state)])
    config = state.config
    app[STATE] = state
    app[DOCUMENT] = Document(
        {(route.method, route.path): route.is_public for route in ROUTES},
        root_path=config.root_path,
        has_key=bool(config.api_keys),
    )
    app.on_response_prepare.append(_sign)
    add_cors(app, config)
    app.middlewares.insert(0, _serve)  # outside the preflight middleware of add_cors
    # A proxy may remove the root path or leave it, so both forms get routes.
    for prefix in sorted({"", config.root_path}):
        for route in ROUTES:
            for path, handler in _spellings(prefix + route.path, route.handler):
                app.router.add_route(route.method, path, handler)
                if route.method == "GET":
                    app.router.add_route("HEAD", path, handler)
    return app


def _spellings(path: str, handler: Handler) -> list[tuple[str, Handler]]:
    """The path with and without a slash at its end, because clients use both."""
    other = path[:-1] if path.endswith("/") else f"{path}/"
    # A pattern that matches slashes itself, and a static file, have one form only.
    if not other or ":" in path or handler is site.static:
        return [(path, handler)]
    return [(path, handler), (other, site.redirect if handler in PAGES else handler)]


@web.middleware
async def _serve(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id.begin(request)
    connection_of(request).request = request
    with request.app[STATE].http_metrics.measured(request):
        response = await handler(request)
        try:
            response = await deliver(request, response)
        except RequestError as error:
            response = _error_response(request, error)
        request[STATUS] = response.status
        return response


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "pyserve"  # aiohttp would send its own and Python's versions
    response.headers[request_id.HEADER] = request_id.current.get()
    if _is_anthropic(request):
        response.headers[request_id.ANTHROPIC_HEADER] = request_id.current.get()
    if request.query_string and response.status < 400:
        name_unknown_parameters(request, response)
    request[STATUS] = response.status  # set now, as a stream's client may leave before its end
    request.app[STATE].metrics.num_responses[response.status] += 1


def _middleware(state: ServerState) -> Middleware:
    unknown_paths = UnknownPaths(
        [(route.method, route.path) for route in ROUTES if "{" not in route.path]
        + [("GET", f"{site.STATIC}/{name}") for name in site.FILES],
        root_path=state.config.root_path,
    )
    public = {route.handler for route in ROUTES if route.is_public} | {site.redirect}
    using_model = {route.handler for route in ROUTES if route.is_of_model}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        target = request.match_info.handler
        state.request_log.begin()
        try:
            inner_user = connection_of(request).inner_user
            if inner_user is not None:
                request[USER], request[CLIENT] = inner_user, client_of(inner_user)
                request[IS_BACKGROUND] = True
            elif target not in public:
                user = state.keys.user(request)
                if user is None:
                    raise UnauthorizedError("the API key is missing or wrong")
                request[USER] = user
                request[CLIENT] = state.keys.client(request, user)
            if target not in using_model:
                return await handler(request)
            state.enter()
            try:
                return await handler(request)
            finally:
                state.leave()
        except RequestError as error:
            if target in using_model:
                state.request_log.refused(request, error)
            response = _error_response(request, error)
            release_frames(error)
        except web.HTTPException as error:
            response = _router_error(request, error, unknown_paths)
        except ConnectionError:
            raise  # the client has gone; aiohttp closes the connection
        except Exception as error:
            response = _error_response(request, log_unexpected(error))
        if state.status in ("draining", "failed"):
            response.force_close()
        return response

    return guard


def _error_response(request: web.Request, error: RequestError) -> web.Response:
    """An error response in the format of the route that the path names or lies under."""
    path = request.path.removeprefix(request.app[STATE].config.root_path)
    under = (r.error_body for r in ROUTES if f"{path}/".startswith(f"{r.path}/"))
    return error_response(error, next(under, error_body))


def _is_anthropic(request: web.Request) -> bool:
    """Whether the path names a route of Anthropic's API, or lies under one."""
    path = request.path.removeprefix(request.app[STATE].config.root_path)
    return f"{path}/".startswith(_ANTHROPIC)


def _router_error(
    request: web.Request, error: web.HTTPException, unknown_paths: UnknownPaths
) -> web.Response:
    if isinstance(error, web.HTTPMethodNotAllowed):
        response = _error_response(
            request, unknown_paths.wrong_method(request, error.allowed_methods)
        )
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    if isinstance(error, web.HTTPNotFound):
        return _error_response(request, unknown_paths.not_found(request))
    return _error_response(request, log_unexpected(error))
