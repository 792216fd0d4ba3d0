"""All errors that a user can meet, in one tree of classes.

A `RequestError` ends one request with an HTTP status; a `StartupError` ends the process with one
line. Messages name the field or file, the value and the limit. They never contain a path inside
pyserve, a repr of an object or a stack trace. Bugs of ours raise other exceptions and asserts.
"""

from __future__ import annotations


class PyserveError(Exception):
    """Base of all errors whose messages are meant for users."""


class RequestError(PyserveError):
    """Ends one request. `param` is the request field at fault, None where there is none."""

    status = 400
    type = "BadRequestError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(RequestError):
    """400: a value is missing, of the wrong type or out of range."""


class ContextError(InvalidRequestError):
    """400: the prompt alone does not fit the context.

    said           the end of the message, which says how long the prompt is.
    num_tokens     number of tokens that the prompt has at least.
    max_model_len  the context length, in tokens.
    """

    def __init__(self, said: str, param: str, *, num_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens: {said}", param
        )
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len


class NotBuiltError(RequestError):
    """400: a field of the wire format that this version does not implement yet."""


class UnauthorizedError(RequestError):
    """401: no key or a wrong one."""

    status = 401
    type = "AuthenticationError"


class NotFoundError(RequestError):
    """404: no such model or route."""

    status = 404
    type = "NotFoundError"


class MethodNotAllowedError(RequestError):
    """405: the route exists, the verb does not."""

    status = 405
    type = "MethodNotAllowedError"


class BodyTooLargeError(RequestError):
    """413: the body is over the limit."""

    status = 413
    type = "RequestEntityTooLargeError"


class BodyTooLateError(RequestError):
    """408: the body did not arrive in time."""

    status = 408
    type = "RequestTimeoutError"


class RetryError(RequestError):
    """An error after which the client may retry, after `retry_after_s` seconds (Retry-After)."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RetryError):
    """429: the queue is full."""

    status = 429
    type = "RateLimitError"


class TooManyBytesError(RetryError):
    """429: request bodies, or responses that clients do not read, take too much memory."""

    status = 429
    type = "RateLimitError"


class UnavailableError(RetryError):
    """503: the server is not ready or is shutting down, or the engine has stopped."""

    status = 503
    type = "ServiceUnavailableError"


class AbortedError(RequestError):
    """499: the operator has aborted the request. SDKs do not retry on this status."""

    status = 499
    type = "AbortedError"


class EngineError(RequestError):
    """500: a step that computed this request failed, or its logits were not numbers."""

    status = 500
    type = "InternalServerError"


class ChatTemplateError(RequestError):
    """500: the model's chat template is broken, takes too long or makes too much text.

    The client's messages are not at fault. Only chats need a template; other endpoints still work.

    is_timeout  rendering took too long and was given up; with more time it might succeed.
    """

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.is_timeout = is_timeout


class DeviceError(EngineError):
    """500: the GPU has failed or hangs, so nothing can run on it any more and the server ends."""


class StartupError(PyserveError):
    """Ends the process before it is ready, with one line that says what to do.

    The exit code is 2 where a command refuses it at once, and 1 where the start-up fails later.
    """


class ConfigError(StartupError):
    """A flag, or a value of config.json, that is wrong or not supported."""


class CheckpointError(StartupError):
    """A file of the model is missing, truncated or inconsistent."""


class BuildError(StartupError):
    """The native libraries are not in the package and cannot be compiled here."""


class PlanError(StartupError):
    """The model and its KV cache do not fit the memory they may use."""


def release_frames(error: BaseException) -> None:
    """Drop the tracebacks of `error`, which has been handled, and of its causes.

    A traceback holds the frames that the error was raised through, and so their local variables,
    such as the text of a prompt and a million tokens. If a frame can reach the error, for example
    through a future, that is a reference cycle: the memory would stay until the garbage collector
    runs, which on a quiet server may be never.
    """
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
