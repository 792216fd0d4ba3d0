"""What chat and text completions share: prompts in, an answer out, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
from aiohttp import web

from pyserve import __version__
from pyserve.api.endpoints.body import ignored_header
from pyserve.api.generation import stream
from pyserve.api.generation.generate import Generation
from pyserve.api.generation.prompts import Prompt, check_total
from pyserve.api.generation.sampling import Resolver
from pyserve.api.generation.slices import Slices
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.http.keys import CLIENT, USER
from pyserve.api.http.request_id import current as current_request_id
from pyserve.api.state import Loaded, ServerState
from pyserve.api.wire.protocol import (
    MAX_ECHO_CHARS,
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_SEQUENCES,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
)
from pyserve.errors import InvalidRequestError, UnavailableError
from pyserve.params import SamplingParams, shown
from pyserve.words import counted

FINGERPRINT = f"pyserve-{__version__}"
CLAMPED_HEADER = "x-pyserve-clamped"
LAST_WRITE_S = 10.0  # for a client to take the error of a request that took too long
SHORT_ANSWER = 2**17  # characters encoded on the event loop: a millisecond

Response = ChatResponse | CompletionResponse


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What differs between the two: names, objects, and the default token limit.

    default_max_tokens   None: whatever the context leaves.
    whole                (id, created, model, generation) -> the object of a whole answer.
    """

    id_prefix: str
    prompt_name: str
    default_max_tokens: int | None
    frames: type[stream.ChatFrames] | type[stream.CompletionFrames]
    whole: Callable[[str, int, str, Generation], Response]


class _Deadline:
    """Ends a request that takes longer than `timeout_s`, 0 for none: with an error that says so,
    and where the client does not even take that, with its connection.
    """

    def __init__(self, request: web.Request, generation: Generation, timeout_s: float) -> None:
        self._request = request
        self._generation = generation
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._interrupt)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self) -> None:
        reason = f"the request has taken longer than {self._timeout_s:g} s (--request-timeout)"
        self._generation.interrupt(UnavailableError(reason))
        self._timer = asyncio.get_running_loop().call_later(LAST_WRITE_S, self._abort)

    def _abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


async def answer(
    request: web.Request,
    state: ServerState,
    loaded: Loaded,
    *,
    endpoint: Endpoint,
    body: ChatRequest | CompletionRequest,
    ignored: list[str],
    prompts: list[Prompt],
    arrived_s: float,
) -> web.StreamResponse:
    """Run `body` on `prompts`, all checks first. Raises RequestError before the status is sent."""
    options = body.stream_options
    if options is not None and not body.stream:
        ignored = [*ignored, "stream_options"]  # a whole answer has its usage anyway
        options = None
    include_usage = bool(options and options.include_usage)
    continuous_usage = bool(options and options.continuous_usage_stats)
    if continuous_usage and not include_usage:
        ignored = [*ignored, "stream_options.continuous_usage_stats"]
    if body.priority and not loaded.engine.info.has_priorities:
        ignored = [*ignored, "priority"]
    if body.cache_salt and not loaded.engine.info.enable_prefix_caching:
        ignored = [*ignored, "cache_salt"]
    request_id = endpoint.id_prefix + (
        _name("request_id", body.request_id) or current_request_id.get()
    )
    created = int(time.time())
    generation = Generation(loaded.engine, state.metrics, arrived_s=arrived_s)
    reason = "abort"
    deadline = _Deadline(request, generation, state.config.request_timeout_s)
    try:
        salt = state.keys.cache_salt(request[USER], _name("cache_salt", body.cache_salt) or "")
        await _submit(
            generation, loaded, endpoint, body, prompts, cache_salt=salt, user=request[CLIENT]
        )
        if only_echoes(body):  # no queue bounds it
            num_chars = sum(len(choice.prefix) for choice in generation.choices)
            connection_of(request).check_unread(num_chars)
        headers = {**ignored_header(ignored), **_clamped_header(body, generation)}
        state.request_log.arrived(request, generation)
        if body.stream:
            frames = endpoint.frames(
                request_id, created=created, model=state.model_name, fingerprint=FINGERPRINT
            )
            return await stream.send(
                request,
                generation,
                frames,
                headers=headers,
                include_usage=include_usage,
                continuous_usage=include_usage and continuous_usage,
            )
        await generation.read_all()
    except ConnectionError:
        raise  # the client has gone
    except Exception:
        reason = "error"
        raise
    finally:
        deadline.cancel()
        generation.close(reason)
        state.request_log.ended(request, generation)
    num_chars = sum(len(piece) for choice in generation.choices for piece in choice.pieces)
    encode = partial(_encode, endpoint, request_id, created, state.model_name, generation)
    data = await state.run_text(request, num_chars, encode, short=SHORT_ANSWER, is_answer=True)
    return json_response(data, headers)


def json_response(
    value: msgspec.Struct | bytes, headers: dict[str, str] | None = None
) -> web.Response:
    """`value`, or the JSON that it is, as a 200."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return web.Response(body=body, content_type="application/json", headers=headers)


def _encode(
    endpoint: Endpoint, request_id: str, created: int, model: str, generation: Generation
) -> bytes:
    """A whole answer, choice by choice: encoding one keeps all other threads waiting."""
    response = endpoint.whole(request_id, created, model, generation)
    choices = b",".join([msgspec.json.encode(choice) for choice in response.choices])
    rest = msgspec.json.encode(msgspec.structs.replace(response, choices=[]))
    before, name, behind = rest.partition(b'"choices":[')  # quotes in a text are escaped
    return b"".join((before, name, choices, behind))


async def _submit(
    generation: Generation,
    loaded: Loaded,
    endpoint: Endpoint,
    body: ChatRequest | CompletionRequest,
    prompts: list[Prompt],
    *,
    cache_salt: str,
    user: str,
) -> None:
    engine = loaded.engine
    resolver = Resolver(body, engine.info, tokenizer=loaded.tokenizer, defaults=loaded.defaults)
    num_sequences = len(prompts) * resolver.n
    if num_sequences > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{counted(len(prompts), 'prompt')} times n {resolver.n} are {num_sequences} "
            f"sequences, the limit is {MAX_SEQUENCES}",
            "n",
        )
    priority = body.priority or 0
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {shown(priority)}",
            "priority",
        )
    slices = Slices()
    limits = []
    for prompt in prompts:
        limits.append(_params(resolver, endpoint, body, loaded, len(prompt.token_ids)))
        await slices.rest()
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    check_total(num_tokens, n=resolver.n, param=endpoint.prompt_name)
    num_chars = sum(len(prompt.echo) for prompt in prompts) * resolver.n
    if num_chars > MAX_ECHO_CHARS:
        raise InvalidRequestError(
            f"echo would show {num_chars} characters of prompts, the limit is {MAX_ECHO_CHARS}",
            "echo",
        )
    runs = not only_echoes(body)
    if runs:
        num_tokens *= resolver.n
        engine.check_room(num_sequences, num_tokens=num_tokens, user=user)  # all of them or none
    for prompt, params in zip(prompts, limits, strict=True):
        await generation.submit(
            prompt.token_ids,
            params,
            n=resolver.n,
            ending=resolver.ending,
            detokenizer=prompt.detokenizer,
            priority=priority,
            cache_salt=cache_salt,
            user=user,
            prefix=prompt.echo,
            runs=runs,
        )


def only_echoes(body: ChatRequest | CompletionRequest) -> bool:
    """Whether a text completion asks for its prompt and nothing more."""
    return isinstance(body, CompletionRequest) and bool(body.echo) and body.max_tokens == 0


def _params(
    resolver: Resolver,
    endpoint: Endpoint,
    body: ChatRequest | CompletionRequest,
    loaded: Loaded,
    num_prompt_tokens: int,
) -> SamplingParams:
    limit_name, max_tokens = _token_limit(body)
    if only_echoes(body):
        max_tokens = 1
    default = endpoint.default_max_tokens
    if default is None:
        default = loaded.defaults.max_new_tokens
    if default is None:
        default = loaded.engine.info.max_model_len
    return resolver.params(
        num_prompt_tokens,
        prompt_name=endpoint.prompt_name,
        max_tokens=max_tokens,
        limit_name=limit_name,
        default=default,
    )


def _token_limit(body: ChatRequest | CompletionRequest) -> tuple[str, int | None]:
    """The field that limits the output of `body`, and its value."""
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def _clamped_header(
    body: ChatRequest | CompletionRequest, generation: Generation
) -> dict[str, str]:
    """What is left of a token limit that the context cuts: the least, where prompts differ."""
    name, asked = _token_limit(body)
    granted = min(choice.params.max_tokens for choice in generation.choices)
    return {CLAMPED_HEADER: f"{name}={granted}"} if asked and asked > granted else {}


def _name(field: str, value: str | None) -> str | None:
    if value is not None and not 1 <= len(value) <= MAX_NAME_CHARS:
        raise InvalidRequestError(
            f"{field} must have 1 to {MAX_NAME_CHARS} characters, got {len(value)}", field
        )
    return value
