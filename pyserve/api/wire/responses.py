"""Wire types of requests to the Responses API, with OpenAI's names and vLLM's additional fields.

Items and tools arrive as plain objects and are decoded by their `type` in the endpoints
(responses_items.py, responses_tools.py): those of an unknown type may have any fields and are
ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pyserve.api.wire.protocol import MAX_MESSAGES, StructuredOutputs

MAX_ITEMS = 2 * MAX_MESSAGES  # of a request, including the items of the earlier responses
MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512  # of metadata
MAX_LABEL_CHARS = 512  # of user, safety_identifier and prompt_cache_key, which responses repeat
ITEM_ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
LOGPROBS = "message.output_text.logprobs"  # the entry of `include` that requests logprobs
FORMATS = ("text", "json_object", "json_schema")
SUMMARIES = ("auto", "concise", "detailed")
TRUNCATIONS = ("auto", "disabled")

Object = dict[str, Any]


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ChosenTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    namespace: str | None = None
    mode: str | None = None
    tools: list[Object] | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    input: str | list[Object] | None = None
    instructions: str | None = None
    stream: bool | None = None
    tools: list[Object] | None = None
    tool_choice: str | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    conversation: Any = None
    prompt: Any = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    client_metadata: Any = None
    stream_options: Object | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, Any] | None = None  # body.py checks that the values are numbers
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: Object | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None


class TextPart(msgspec.Struct, frozen=True):
    """A part of a message's content, of reasoning or of a tool result: it has text or a refusal."""

    type: str
    text: str | None = None
    refusal: str | None = None


class MessageItem(msgspec.Struct, frozen=True):
    """A message of the user, the assistant, the system or the developer."""

    role: str
    content: str | list[TextPart]
    type: str = "message"
    id: str | None = None
    status: str | None = None


class ReasoningItem(msgspec.Struct, frozen=True):
    """The reasoning of the model before an answer."""

    type: str
    id: str | None = None
    summary: list[TextPart] | None = None
    content: list[TextPart] | None = None
    status: str | None = None


class CallItem(msgspec.Struct, frozen=True):
    """The assistant's call of a function."""

    type: str
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None
    id: str | None = None
    status: str | None = None


class CustomCallItem(msgspec.Struct, frozen=True):
    """The assistant's call of a custom tool, which takes plain text."""

    type: str
    call_id: str
    name: str
    input: str
    namespace: str | None = None
    id: str | None = None
    status: str | None = None


class ResultItem(msgspec.Struct, frozen=True):
    """The result of a call of a function or custom tool."""

    type: str
    call_id: str
    output: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class ReferenceItem(msgspec.Struct, frozen=True):
    """A reference to an item of a stored response, by its id."""

    id: str
    type: str = "item_reference"


Item = MessageItem | ReasoningItem | CallItem | CustomCallItem | ResultItem | ReferenceItem
ITEMS: dict[str, type[Item]] = {
    "message": MessageItem,
    "reasoning": ReasoningItem,
    "function_call": CallItem,
    "function_call_output": ResultItem,
    "custom_tool_call": CustomCallItem,
    "custom_tool_call_output": ResultItem,
    "item_reference": ReferenceItem,
}


class FunctionTool(msgspec.Struct, frozen=True):
    type: str
    name: str
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class CustomTool(msgspec.Struct, frozen=True):
    """A tool that takes plain text. `format` would restrict the text; it has no effect here."""

    type: str
    name: str
    description: str | None = None
    format: Object | None = None


class NamespaceTool(msgspec.Struct, frozen=True):
    """A group of tools; the namespace's name is put before the names of the tools."""

    type: str
    name: str
    tools: list[Object]
    description: str | None = None
