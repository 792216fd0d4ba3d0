"""Shared by chat and text completions: request fields -> Job, and the form of OpenAI's answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
from msgspec import UNSET, UnsetType

from pyserve import __version__
from pyserve.api.endpoints.answer import Head
from pyserve.api.endpoints.beam import check_beam_work, read_beam
from pyserve.api.endpoints.logprobs import NO_TOKENS, AskedTokens
from pyserve.api.endpoints.prompts import check_total
from pyserve.api.endpoints.sampling import Resolver
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import Job, Prompt
from pyserve.api.generation.slices import Slices
from pyserve.api.generation.stream import COMMENT
from pyserve.api.generation.told import Told
from pyserve.api.http.errors import error_body
from pyserve.api.state import Loaded
from pyserve.api.wire.encoding import encode_line
from pyserve.api.wire.protocol import (
    MAX_ECHO_CHARS,
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_SEQUENCES,
    ChatChoice,
    ChatChunk,
    ChatResponse,
    CompletionChoice,
    CompletionChunk,
    CompletionResponse,
    SamplingFields,
    Usage,
)
from pyserve.client import Constraint
from pyserve.constraints import unconstrained
from pyserve.errors import InvalidRequestError, RequestError
from pyserve.params import shown
from pyserve.text.parts import Content, Part, Reasoning
from pyserve.text.reasoning import ReasoningStage
from pyserve.words import counted

FINGERPRINT = f"pyserve-{__version__}"
_DONE = b"data: [DONE]\n\n"
_END = b"}\n\n"
_HOLE = b"\0"  # JSON text never contains this byte, so encoded JSON can be split at it


async def make_job(
    body: SamplingFields,
    loaded: Loaded,
    prompts: list[Prompt],
    *,
    prompt_name: str,
    limit: tuple[str, int | None],
    default_max_tokens: int | None,
    ignored: list[str],
    is_run: bool = True,
    make_reasoning: Callable[[], ReasoningStage] | None = None,
    make_constraint: Callable[[], Constraint | None] = unconstrained,
    tokens: AskedTokens = NO_TOKENS,
    is_prompt_only: bool = False,
) -> Job:
    """Make the Job of a request whose prompts have been read; all other fields are checked here.

    prompt_name         the field with the prompts, which errors name.
    limit               name and value of the field that limits the output tokens.
    default_max_tokens  used if that value is None; None: all that the prompt leaves of the context.
    ignored             names of fields without effect; more may be added.
    tokens              the logprobs and token ids that the request asks for.

    make_reasoning, make_constraint, is_run and is_prompt_only are those of Job. Raises
    InvalidRequestError naming the field.
    """
    info = loaded.engine.info
    cache_salt = checked_name("cache_salt", body.cache_salt)
    resolver = Resolver(body, info, tokenizer=loaded.tokenizer, defaults=loaded.defaults)
    beam = read_beam(body, width=resolver.best_of, make_constraint=make_constraint, ignored=ignored)
    _check_sequences(len(prompts), resolver.best_of)
    priority = check_priority(body.priority or 0)
    limit_name, asked = limit
    slices = Slices()
    params = []
    for prompt in prompts:
        own = resolver.params(
            len(prompt.token_ids),
            prompt_name=prompt_name,
            max_tokens=asked if is_run and not is_prompt_only else 1,
            limit_name=limit_name,
            default=info.max_model_len if default_max_tokens is None else default_max_tokens,
        )
        params.append(tokens.apply(own))
        await slices.rest()
    beam = beam if is_run and not is_prompt_only else None
    check_beam_work(beam, prompts, params, limit_name)
    _check_size(prompts, resolver.best_of, prompt_name, tokens)
    granted = min(one.max_tokens for one in params)
    options = body.stream_options if body.stream else None
    include_usage = bool(options and options.include_usage)
    has_continuous_usage = bool(options and options.continuous_usage_stats)
    without_effect = {
        "stream_options": body.stream_options is not None and not body.stream,  # usage comes anyway
        "stream_options.continuous_usage_stats": has_continuous_usage and not include_usage,
        "priority": priority and not info.has_priorities,
        "cache_salt": cache_salt and not info.enable_prefix_caching,
    }
    return Job(
        prompts=prompts,
        params=params,
        ending=resolver.ending,
        n=resolver.n,
        best_of=resolver.best_of,
        beam=beam,
        make_reasoning=make_reasoning,
        make_constraint=make_constraint,
        words=tokens.words,
        is_run=is_run,
        is_prompt_only=is_prompt_only,
        is_streamed=bool(body.stream),
        include_usage=include_usage,
        has_continuous_usage=include_usage and has_continuous_usage,
        priority=priority,
        cache_salt=cache_salt,
        request_id=checked_name("request_id", body.request_id),
        model=body.model or "",
        ignored=[*ignored, *(name for name, is_so in without_effect.items() if is_so)],
        clamped=f"{limit_name}={granted}" if asked and asked > granted else "",
    )


def checked_name(field: str, value: str | None) -> str:
    """The client's value of a name field, checked; "" if it is None. Raises InvalidRequestError."""
    if value is not None and not 1 <= len(value) <= MAX_NAME_CHARS:
        raise InvalidRequestError(
            f"{field} must have 1 to {MAX_NAME_CHARS} characters, got {len(value)}", field
        )
    return value or ""


def check_priority(priority: int) -> int:
    """Return `priority` if it is in range. Raises InvalidRequestError."""
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {shown(priority)}",
            "priority",
        )
    return priority


def _check_sequences(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{counted(num_prompts, 'prompt')} times n {n} are {num_prompts * n} sequences, "
            f"the limit is {MAX_SEQUENCES}",
            "n",
        )


def _check_size(prompts: list[Prompt], n: int, prompt_name: str, tokens: AskedTokens) -> None:
    """Bound what the prompts, with n sequences for each, take in memory and in the answer."""
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    check_total(num_tokens, n=n, param=prompt_name)
    tokens.check_prompts(num_tokens, n=n)
    num_chars = sum(len(prompt.echo) for prompt in prompts) * n
    if num_chars > MAX_ECHO_CHARS:
        raise InvalidRequestError(
            f"echo would show {num_chars} characters of prompts, the limit is {MAX_ECHO_CHARS}",
            "echo",
        )


def told_of(parts: Sequence[Part]) -> list[Told]:
    """The tokens of an answer's parts, in order."""
    return [token for part in parts for token in part.tokens]


def prompt_fields(choice: Choice) -> dict[str, Any]:
    """The fields prompt_logprobs and prompt_token_ids for the prompt of a choice.

    Each is None if the request did not ask for it; both are left out if it asks nothing about
    tokens.
    """
    words = choice.words
    if words is None:
        return {}
    token_ids = choice.prompt_token_ids
    return {
        "prompt_logprobs": words.prompt(token_ids, choice.stream.prompt_logprobs),
        "prompt_token_ids": list(token_ids) if words.has_ids else None,
    }


def nothing_of_prompt(choice: Choice) -> dict[str, Any]:
    """The `describe_prompt` of responses whose choices have the prompt's fields themselves."""
    return {}


def encode_whole(
    response_type: type[ChatResponse] | type[CompletionResponse],
    describe: Callable[[Choice], ChatChoice | CompletionChoice],
    head: Head,
    generation: Generation,
    *,
    describe_prompt: Callable[[Choice], dict[str, Any]] = nothing_of_prompt,
) -> bytes:
    """Encode a complete answer as JSON.

    describe         makes the object of one choice.
    describe_prompt  makes fields of the response from its first choice.

    Encoding holds the interpreter's lock, so each choice is encoded by itself, to let other threads
    run in between.
    """
    response = response_type(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[],
        system_fingerprint=FINGERPRINT,
        usage=generation.usage(),
        **describe_prompt(generation.choices[0]),
    )
    choices = b",".join([msgspec.json.encode(describe(choice)) for choice in generation.shown()])
    before, name, behind = msgspec.json.encode(response).partition(b'"choices":[')
    # The partition found the right place: no text can contain `"choices":[`, as quotes are escaped.
    return b"".join((before, name, choices, behind))


class OpenAIFrames(ABC):
    """The chunks of a streamed answer as server-sent events; the base for both endpoints.

    A chunk in which only the text is new is encoded once for each choice, with a hole where its
    text belongs. One more text then costs no more than the encoding of that text.
    """

    chunk_type: type[ChatChunk] | type[CompletionChunk]

    def __init__(self, head: Head, job: Job) -> None:
        self._head = head
        self._has_end_usage = job.include_usage
        self._has_usage = job.has_continuous_usage
        # Index of a choice -> its encoded chunk, split at the places of the text.
        self._cuts: dict[int, list[bytes]] = {}
        self._reasoning_cuts: dict[int, list[bytes]] = {}

    @abstractmethod
    def entry(self, choice: Choice, part: Part | None, *, is_last: bool = False) -> Any:
        """The element of `choices` for one more part of `choice`.

        With `is_last` it ends the choice: `part` is the last part, or None if none is left.
        """

    def begin(self) -> bytes:
        """Nothing is sent before the first step."""
        return b""

    def first(self, choice: Choice) -> bytes:
        """Nothing is sent before the first text."""
        return b""

    def part(self, choice: Choice, part: Part) -> bytes:
        """The chunk for one part of an answer."""
        if type(part) is Content and not part.tokens:
            cuts_of = self._cuts
        elif type(part) is Reasoning and not part.tokens:
            cuts_of = self._reasoning_cuts
        else:
            return self.chunk([self.entry(choice, part)], usage=self.usage_so_far(choice))
        cuts = cuts_of.get(choice.index)
        if cuts is None:
            entry = self.entry(choice, type(part)(cast(str, msgspec.Raw(_HOLE))))
            cuts = cuts_of[choice.index] = self.chunk([entry]).split(_HOLE)
        frame = encode_line(part.text).join(cuts)
        if self._has_usage:
            usage = encode_line(choice.usage())
            return b'%b,"usage":%b%b' % (frame.removesuffix(_END), usage, _END)
        return frame

    def finish(self, choice: Choice, last: Part | None) -> bytes:
        """The chunk that ends a choice, with its last part if one is left."""
        entry = self.entry(choice, last, is_last=True)
        usage = self.usage_so_far(choice)
        return self.chunk([entry], usage=usage, system_fingerprint=FINGERPRINT)

    def end(self, usage: Usage) -> bytes:
        """The end of the stream, after a chunk with the usage if the request asked for it."""
        if not self._has_end_usage:
            return _DONE
        return self.chunk([], usage=usage, system_fingerprint=FINGERPRINT) + _DONE

    def failed(self, error: RequestError) -> bytes:
        """An error object, followed by the end of the stream."""
        return b"data: %b\n\n" % error_body(error) + _DONE

    def keep_alive(self, choices: Sequence[Choice]) -> bytes:
        """A comment, which clients ignore."""
        return COMMENT

    def usage_so_far(self, choice: Choice) -> Usage | UnsetType:
        """The usage of `choice` so far, for its chunk; UNSET unless the request asked for it."""
        return choice.usage() if self._has_usage else UNSET

    def chunk(self, choices: list[Any], **more: Any) -> bytes:
        """One encoded chunk with these choices and further fields."""
        head = self._head
        chunk = self.chunk_type(
            id=head.id, created=head.created, model=head.model, choices=choices, **more
        )
        return b"data: %b\n\n" % encode_line(chunk)
