"""Turns of the Messages API -> messages of a chat."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence

from pyserve.api.wire.messages import TURN_ROLES, Block, MessagesTool, ResultBlock, Turn
from pyserve.api.wire.protocol import MAX_PARTS, ContentPart, Message
from pyserve.api.wire.tools import FunctionCall, MessageCall
from pyserve.errors import InvalidRequestError

# The types of blocks that a turn of each role, and the content of a tool_result, may have.
TYPES = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
    "tool_result": ("text", "tool_reference"),
}
NOT_TEXT = ("image", "document", "search_result")
ERROR_MARK = "Error: "  # put before a result with is_error, for which templates have no field
HIDDEN = "pyserve:"  # begins a signature that holds omitted thinking, encoded as base64
# The first line of a system prompt that identifies the client. Some clients change it with every
# request, so the prefix cache would find nothing of the prompt behind it.
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")


def system_message(system: str | Sequence[Block], ignored: list[str]) -> Message | None:
    """The system prompt without its billing line; None if nothing else is in it."""
    texts = [system] if isinstance(system, str) else _texts(system, "system", "system")
    kept = [_BILLING.sub("", text) for text in texts]
    if kept != list(texts):
        ignored.append("system.x-anthropic-billing-header")
    kept = list(filter(None, kept))
    return Message("system", _content(kept)) if kept else None


def chat_messages(turns: Sequence[Turn], ignored: list[str]) -> list[tuple[Message, str]]:
    """Translate turns; returns each message with the path of its turn, such as "messages[0]".

    The tool results of a user's turn come before its text, next to the calls that they answer.

    Raises InvalidRequestError naming the field.
    """
    call_ids: set[str] = set()
    found: list[tuple[Message, str]] = []
    num_blocks = 0
    for i, turn in enumerate(turns):
        path = f"messages[{i}]"
        if turn.role not in TURN_ROLES:
            raise InvalidRequestError(
                f"{path}.role must be one of {', '.join(TURN_ROLES)}, got {turn.role[:40]}",
                f"{path}.role",
            )
        if not isinstance(turn.content, str):
            num_blocks += _num_blocks(turn.content)
        if num_blocks > MAX_PARTS:
            raise InvalidRequestError(
                f"messages hold more than {MAX_PARTS} blocks, the limit", "messages"
            )
        found += [(message, path) for message in _read(turn, path, call_ids, ignored)]
    return found


def referenced_tools(turns: Sequence[Turn]) -> set[str]:
    """The names of the tools that tool_reference blocks in tool results refer to."""
    return {
        inner.tool_name
        for turn in turns
        for block in (turn.content if isinstance(turn.content, list) else ())
        for inner in (block.content if isinstance(block.content, list) else ())
        if inner.tool_name
    }


def is_shown(tool: MessagesTool, referenced: set[str]) -> bool:
    """Whether the prompt shows a tool: the client runs it, and it is not deferred unless named in
    `referenced`."""
    is_own = tool.type in (None, "custom")
    return is_own and (not tool.defer_loading or tool.name in referenced)


def hidden(thinking: str) -> str:
    """A signature that holds thinking which the client was not shown; `_thinking` reads it back."""
    return HIDDEN + base64.b64encode(thinking.encode()).decode()


def _read(turn: Turn, path: str, call_ids: set[str], ignored: list[str]) -> Iterator[Message]:
    if isinstance(turn.content, str):
        yield Message(turn.role, turn.content)
        return
    where = f"{path}.content"
    if not turn.content:
        raise InvalidRequestError(f"{where} must hold at least one block, got 0", where)
    if turn.role == "assistant":
        yield _assistant(turn.content, where, call_ids, ignored)
        return
    results = [block for block in turn.content if block.type == "tool_result"]
    if turn.role == "user":
        for i, block in enumerate(turn.content):
            if block.type == "tool_result":
                yield _result(block, f"{where}[{i}]", call_ids)
    texts = _texts(turn.content, where, turn.role)
    if texts or not results:
        yield Message(turn.role, _content(texts))


def _assistant(
    blocks: Sequence[Block], where: str, call_ids: set[str], ignored: list[str]
) -> Message:
    """The assistant's turn as one message; the texts of its blocks are joined with no separator."""
    calls: list[MessageCall] = []
    thinking: list[str] = []
    for i, block in enumerate(blocks):
        path = f"{where}[{i}]"
        if block.type == "tool_use":
            call_id, name = _required(block, "id", path), _required(block, "name", path)
            call_ids.add(call_id)
            calls.append(MessageCall(FunctionCall(name, block.input or {}), call_id, "function"))
        elif block.type == "thinking":
            thinking.append(_thinking(block, path))
        elif block.type == "redacted_thinking":
            ignored.append("messages.content.redacted_thinking")
    text = "".join(_texts(blocks, where, "assistant"))
    return Message(
        "assistant",
        text if text or not calls else None,
        reasoning_content="".join(thinking) or None,
        tool_calls=calls or None,
    )


def _thinking(block: Block, path: str) -> str:
    """The text of a thinking block, read from its signature if the thinking was omitted.

    Raises InvalidRequestError.
    """
    thinking = block.thinking
    if thinking is None:
        raise InvalidRequestError(f"{path}.thinking is missing", f"{path}.thinking")
    signature = block.signature or ""
    if thinking or not signature.startswith(HIDDEN):
        return thinking
    try:
        data = base64.b64decode(signature.removeprefix(HIDDEN), validate=True)
        return data.decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequestError(
            f"{path}.signature is not as this server has made it", f"{path}.signature"
        ) from None


def _result(block: Block, path: str, call_ids: set[str]) -> Message:
    call_id = _required(block, "tool_use_id", path)
    if call_id not in call_ids:
        raise InvalidRequestError(
            f"{path}.tool_use_id: no tool_use before it has the id {call_id[:80]}",
            f"{path}.tool_use_id",
        )
    content = block.content or ""
    texts = (
        [content] if isinstance(content, str) else _texts(content, f"{path}.content", "tool_result")
    )
    if block.is_error:
        texts = [ERROR_MARK + "".join(texts[:1]), *texts[1:]]
    return Message("tool", _content(texts), tool_call_id=call_id)


def _texts(blocks: Iterable[Block | ResultBlock], where: str, place: str) -> list[str]:
    """The non-empty texts of blocks; a tool_reference counts as the name of its tool.

    where  path of the list of blocks, which errors name.
    place  key of TYPES: the types of blocks that are allowed here.

    Raises InvalidRequestError naming the field.
    """
    found: list[str] = []
    for i, block in enumerate(blocks):
        path = f"{where}[{i}]"
        if block.type in NOT_TEXT:
            raise InvalidRequestError(
                f"{path}.type: the model reads text only, got {block.type}", f"{path}.type"
            )
        if block.type not in TYPES[place]:
            raise InvalidRequestError(
                f"{path}.type must be one of {', '.join(TYPES[place])} here, got {block.type[:40]}",
                f"{path}.type",
            )
        if block.type == "text":
            if block.text is None:
                raise InvalidRequestError(f"{path}.text is missing", f"{path}.text")
            found.append(block.text)
        elif isinstance(block, ResultBlock):
            found.append(_required(block, "tool_name", path))
    return list(filter(None, found))


def _content(texts: list[str]) -> str | list[str | ContentPart]:
    """A single text becomes a plain string, so that it makes the same prompt in a block or not."""
    if len(texts) < 2:
        return "".join(texts)
    return list(texts)


def _required(block: Block | ResultBlock, name: str, path: str) -> str:
    """The value of the field `name`. Raises InvalidRequestError if it is missing or empty."""
    value: str | None = getattr(block, name)
    if not value:
        raise InvalidRequestError(f"{path}.{name} is missing", f"{path}.{name}")
    return value


def _num_blocks(blocks: Sequence[Block]) -> int:
    inner = sum(len(block.content) for block in blocks if isinstance(block.content, list))
    return len(blocks) + inner
