"""A ResponsesRequest -> the equivalent ChatRequest, and what the answer needs from the request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pyserve.api.endpoints.metadata import check_metadata
from pyserve.api.endpoints.renamed import Renamed, Rule
from pyserve.api.endpoints.responses_items import TurnReader, Turns
from pyserve.api.endpoints.responses_tools import OwnTools, read_own_tools
from pyserve.api.wire.lenient import MAX_NAME_CHARS, Names
from pyserve.api.wire.protocol import ChatRequest, JsonSchemaFormat, ResponseFormat
from pyserve.api.wire.responses import (
    FORMATS,
    LOGPROBS,
    MAX_LABEL_CHARS,
    SUMMARIES,
    TRUNCATIONS,
    Object,
    ReasoningOptions,
    ResponsesRequest,
    TextOptions,
)
from pyserve.errors import InvalidRequestError

# Fields with the same name and meaning in ResponsesRequest and ChatRequest.
_SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "structured_outputs",
    "priority", "cache_salt", "stream", "parallel_tool_calls", "top_logprobs",
    "chat_template_kwargs", "include_reasoning", "thinking_token_budget",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request.

    body     the request without its `input`, whose contents are in `chat`.
    chat     the same request as a chat.
    tools    the request's tools, from which the answer's calls get the client's names back.
    renamed  turns names of the chat's fields into those that the client used.
    ignored  names of fields without effect that have no counterpart in the chat.
    """

    body: ResponsesRequest
    chat: ChatRequest
    tools: OwnTools
    renamed: Renamed
    ignored: list[str]

    @property
    def has_summaries(self) -> bool:
        """Whether reasoning is returned as a summary, the only form that some clients display."""
        return self.body.reasoning is not None and self.body.reasoning.summary is not None


def read_request(body: ResponsesRequest, history: Sequence[Object], own: Sequence[Object]) -> Asked:
    """Check `body` and translate it into a chat.

    history  the items of the earlier responses.
    own      the items of this request, with references resolved.

    Raises InvalidRequestError naming the field.
    """
    _check_labels(body)
    unknown = Names()
    reader = TurnReader(unknown)
    if body.instructions:
        reader.instruct(body.instructions)
    for item in history:
        reader.read(item, "previous_response_id")
    for i, item in enumerate(own):
        reader.read(item, f"input[{i}]")
    turns = reader.turns()
    if not turns.messages:
        raise InvalidRequestError("input must hold at least one item", "input")
    tools = read_own_tools(body.tools or [], body.tool_choice, unknown)
    reasoning = body.reasoning or ReasoningOptions()
    text = body.text or TextOptions()
    has_logprobs = _read_include(body.include or [], unknown)
    if reasoning.summary not in (None, *SUMMARIES):
        raise InvalidRequestError(
            f"reasoning.summary must be one of {', '.join(SUMMARIES)}, got "
            f"{reasoning.summary[:40]}",
            "reasoning.summary",
        )
    for name, value in (
        ("text.verbosity", text.verbosity),
        ("reasoning.generate_summary", reasoning.generate_summary),
    ):
        if value is not None:
            unknown.add(name)
    chat = ChatRequest(
        messages=turns.messages,
        max_tokens=body.max_output_tokens,
        continue_final_message=True if turns.is_continued else None,
        add_generation_prompt=False if turns.is_continued else None,
        truncate_prompt_tokens=-1 if _is_cut(body.truncation) else None,
        logprobs=True if has_logprobs else False if body.top_logprobs else None,
        reasoning_effort=reasoning.effort,
        response_format=_response_format(text),
        tools=tools.tools or None,
        tool_choice=tools.choice,
        **{name: getattr(body, name) for name in _SAME},
    )
    body = msgspec.structs.replace(body, input=None)
    return Asked(body, chat, tools, Renamed(_rules(turns, tools)), unknown.names)


def own_items(body: ResponsesRequest) -> list[Object]:
    """The items of `input`; a plain text becomes a user message.

    Raises InvalidRequestError if `input` is missing and there is no previous response.
    """
    given = body.input
    if given is None:
        if body.previous_response_id is None:
            raise InvalidRequestError("input is missing", "input")
        return []
    if isinstance(given, list):
        return given
    content = [{"type": "input_text", "text": given}]
    return [{"type": "message", "role": "user", "content": content}]


def _response_format(text: TextOptions) -> ResponseFormat | None:
    asked = text.format
    if asked is None:
        return None
    if asked.type not in FORMATS:
        raise InvalidRequestError(
            f"text.format.type must be one of {', '.join(FORMATS)}, got {asked.type[:40]}",
            "text.format.type",
        )
    if asked.type != "json_schema":
        return ResponseFormat(asked.type, schema=asked.schema)
    if asked.schema is None:
        raise InvalidRequestError("text.format.schema is missing", "text.format.schema")
    schema = JsonSchemaFormat(asked.name or "", asked.schema, asked.description, asked.strict)
    return ResponseFormat("json_schema", schema)


def _read_include(include: Sequence[str], unknown: Names) -> bool:
    """Whether `include` requests logprobs; all other entries are ignored and added to `unknown`."""
    for name in include:
        if name != LOGPROBS:
            unknown.add(f"include.{name[:MAX_NAME_CHARS]}")
    return LOGPROBS in include


def _is_cut(truncation: str | None) -> bool:
    """Whether a prompt that is too long is truncated. Raises InvalidRequestError."""
    if truncation not in (None, *TRUNCATIONS):
        raise InvalidRequestError(
            f"truncation must be one of {', '.join(TRUNCATIONS)}, got {truncation[:40]}",
            "truncation",
        )
    return truncation == "auto"


def _check_labels(body: ResponsesRequest) -> None:
    """Bound the labels and metadata, as every event with the response object repeats them."""
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        value = getattr(body, name)
        if value is not None and len(value) > MAX_LABEL_CHARS:
            raise InvalidRequestError(
                f"{name} has {len(value)} characters, the limit is {MAX_LABEL_CHARS}", name
            )
    check_metadata(body.metadata or {})


def _rules(turns: Turns, tools: OwnTools) -> list[Rule]:
    """The rules that turn names of the chat's fields into names of this API's fields."""

    def path(paths: Sequence[str], index: str, group: str) -> str:
        place = int(index)
        return paths[place] if place < len(paths) else group

    def of_message(found: re.Match[str]) -> str:
        return path(turns.paths, found[1], found[0])

    def of_call(found: re.Match[str]) -> str:
        return turns.call_paths.get((int(found[1]), int(found[2])), found[0])

    def of_tool(found: re.Match[str]) -> str:
        return path(tools.paths, found[1], found[0])

    return [
        (r"messages\[(\d+)\]\.tool_calls\[(\d+)\](?:\.function)?", of_call),
        (r"messages\[(\d+)\]", of_message),
        (r"\bmessages\.tool_call_id\b", "input.call_id"),
        (r"\bmessages\.reasoning_content\b", "input.reasoning"),
        (r"\bmessages\b", "input"),
        (r"tools\[(\d+)\](?:\.function)?", of_tool),
        (r"\btool_choice\.function\b", "tool_choice"),
        (r"\bmax_tokens\b", "max_output_tokens"),
        (r"\bresponse_format\.json_schema\b", "text.format"),
        (r"\bresponse_format\b", "text.format"),
        (r"\breasoning_effort\b", "reasoning.effort"),
        (r"\btruncate_prompt_tokens\b", "truncation"),
        (r"\blogprobs: true\b", f"include: {LOGPROBS}"),
    ]  # fmt: skip


def shown_again(body: ResponsesRequest) -> dict[str, Any]:
    """The request's fields that the response object repeats, with their defaults."""
    reasoning = body.reasoning or ReasoningOptions()
    text = _without_none(body.text) if body.text is not None else {}
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "text": {**text, "format": text.get("format", {"type": "text"})},
        "tool_choice": "auto" if choice is None else _without_none(choice),
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        "user": body.user,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "background": bool(body.background),
    }


def _without_none(value: object) -> Any:
    """A wire type as JSON values, without the fields that are None, in its `format` too."""
    plain = msgspec.to_builtins(value)
    if not isinstance(plain, dict):
        return plain
    given = {key: item for key, item in plain.items() if item is not None}
    return {k: _without_none(v) if isinstance(v, dict) and k == "format" else v
            for k, v in given.items()}  # fmt: skip
