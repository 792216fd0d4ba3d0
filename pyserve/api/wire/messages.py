"""Wire types of Anthropic's Messages API, requests and answers, with Anthropic's names.

Decoding checks the types; the endpoints check the ranges. Fields that no type here has, such as
cache_control, metadata and context_management, are accepted and named as ignored (lenient.py).
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

MIN_THINKING_TOKENS = 1024  # smallest value of thinking.budget_tokens
TURN_ROLES = ("user", "assistant", "system")
TOOL_CHOICE_TYPES = ("auto", "any", "tool", "none")
THINKING_TYPES = ("enabled", "disabled", "adaptive", "between_tools")
THINKING_DISPLAYS = ("summarized", "omitted")
FORMAT_TYPES = ("json_schema",)


class ResultBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block in the content of a tool_result.

    A block of type text needs `text`, one of type tool_reference needs `tool_name`.
    """

    type: str
    text: str | None = None
    tool_name: str | None = None


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A content block. Which fields it has depends on its `type`.

    - text: `text`
    - tool_use: `id`, `name`, `input`
    - tool_result: `tool_use_id`, `content`, `is_error`
    - thinking: `thinking`, `signature`
    - redacted_thinking: `data`
    """

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[Block]


class MessagesTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class MessagesToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a request to /v1/messages that make its prompt."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    cache_salt: str | None = None


# The types that clients send, for /openapi.json.
MESSAGES_SENT = (
    ResultBlock, Block, Turn, MessagesTool, MessagesToolChoice, Thinking, OutputFormat,
    OutputConfig, CountTokensRequest, MessagesRequest,
)  # fmt: skip


class ThinkingDetails(msgspec.Struct, frozen=True):
    thinking_tokens: int


class MessagesUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The number of tokens. `cache_read_input_tokens` of the prompt were in the prefix cache,
    `input_tokens` were not.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingDetails | UnsetType = UNSET


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesResponse(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage


class CountTokensResponse(msgspec.Struct, frozen=True):
    input_tokens: int


class MessagesErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class MessagesErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "error"
    error: MessagesErrorDetail
    request_id: str


class MessageStart(msgspec.Struct, frozen=True, tag_field="type", tag="message_start"):
    message: MessagesResponse


class Ping(msgspec.Struct, frozen=True, tag_field="type", tag="ping"):
    pass


class BlockStart(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: AnswerBlock


class TextDelta(msgspec.Struct, frozen=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, frozen=True, tag_field="type", tag="signature_delta"):
    signature: str


class InputDelta(msgspec.Struct, frozen=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_stop"):
    index: int


class StopDelta(msgspec.Struct, frozen=True):
    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: MessagesUsage


class MessageStop(msgspec.Struct, frozen=True, tag_field="type", tag="message_stop"):
    pass


MessagesEvent = (
    MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
)  # fmt: skip
