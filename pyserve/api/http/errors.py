"""Error responses, in OpenAI's format unless a route has its own. They reveal no internals."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from pyserve.api.http import request_id
from pyserve.api.wire.encoding import encode_line
from pyserve.api.wire.protocol import ErrorDetail, ErrorResponse
from pyserve.errors import (
    EngineError,
    RequestError,
    RetryError,
    TooManyBytesError,
    UnauthorizedError,
)
from pyserve.log import get_logger

MAX_MESSAGE_CHARS = 2000

ErrorBody = Callable[[RequestError], bytes]


def error_body(error: RequestError) -> bytes:
    """`error` as OpenAI's JSON object, on one line because it may be the last event of a stream."""
    detail = ErrorDetail(error.message[:MAX_MESSAGE_CHARS], error.type, error.param, error.status)
    return encode_line(ErrorResponse(detail))


def error_response(error: RequestError, to_body: ErrorBody = error_body) -> web.Response:
    """`error` as a response with its status and headers; `to_body` makes its JSON body."""
    response = web.Response(
        status=error.status, body=to_body(error), content_type="application/json"
    )
    if isinstance(error, RetryError):
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, UnauthorizedError):
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413) or isinstance(error, TooManyBytesError):
        response.force_close()  # the rest of the request's body is not read
    return response


def log_unexpected(error: BaseException) -> RequestError:
    """Log an unexpected exception with its traceback; returns "internal error" for the client."""
    get_logger().error("request %s failed unexpectedly", request_id.current.get(), exc_info=error)
    return EngineError("internal error")
