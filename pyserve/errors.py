"""Every error a user can meet, in one tree.

`RequestError` ends one request with an HTTP status; `StartupError` ends the process with one line.
Messages name the field or file, the value and the limit; never a path inside pyserve, a repr of an
object or a stack trace. Bugs of ours are plain exceptions and asserts, not part of this tree.
"""

from __future__ import annotations


class PyserveError(Exception):
    """Base of all errors that are meant for a user's eyes."""


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

    said        how long it is.
    num_tokens  that it has, at least.
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
    """What may be asked again after so many seconds, which Retry-After says."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RetryError):
    """429: the queue is full."""

    status = 429
    type = "RateLimitError"


class TooManyBytesError(RetryError):
    """429: bodies, or answers that nobody reads, fill their memory."""

    status = 429
    type = "RateLimitError"


class UnavailableError(RetryError):
    """503: not ready, draining, or the engine has stopped."""

    status = 503
    type = "ServiceUnavailableError"


class AbortedError(RequestError):
    """499: the operator has ended it. No status at which SDKs ask again by themselves."""

    status = 499
    type = "AbortedError"


class EngineError(RequestError):
    """500: a step failed under this request, or its logits were not numbers."""

    status = 500
    type = "InternalServerError"


class ChatTemplateError(RequestError):
    """500: the model's chat template is broken, takes too long or makes too much.

    The client's messages are not at fault, and everything but chats works without a template.

    is_timeout  rendering took too long and was given up; with more time it might succeed.
    """

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.is_timeout = is_timeout


class DeviceError(EngineError):
    """500: the GPU failed or hangs; nothing runs on it any more, and the server ends."""


class StartupError(PyserveError):
    """Ends the process before it is ready: one line that says what to do, exit code 1."""


class ConfigError(StartupError):
    """A flag or a value of config.json that cannot be served."""


class CheckpointError(StartupError):
    """A file of the model is missing, truncated, inconsistent or lies about its contents."""


class BuildError(StartupError):
    """The native products are neither in the package nor can they be compiled here."""


class PlanError(StartupError):
    """The model and its KV cache do not fit the memory they may use."""


def release_frames(error: BaseException) -> None:
    """Let go of the frames that `error`, which has been answered, was raised through.

    An error that is kept where one of these frames can reach it, as by a future, is a cycle: what
    the frames hold, the text of a prompt and its million tokens, would stay until the collector
    comes by, which on a quiet server may be never.
    """
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
