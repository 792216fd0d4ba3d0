"""Input items of the Responses API -> messages of a chat.

Everything that the assistant did between two turns of the user comes as several items: reasoning,
text and tool calls. Together they become one assistant message of the chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pyserve.api.endpoints.body import wrong_type
from pyserve.api.wire.lenient import MAX_NAME_CHARS, Names
from pyserve.api.wire.protocol import MAX_PARTS, ContentPart, Message
from pyserve.api.wire.responses import (
    ITEM_ROLES,
    ITEMS,
    MAX_ITEMS,
    TEXT_PARTS,
    CallItem,
    CustomCallItem,
    Item,
    MessageItem,
    Object,
    ReasoningItem,
    ReferenceItem,
    ResultItem,
    TextPart,
)
from pyserve.api.wire.tools import FunctionCall, MessageCall
from pyserve.errors import InvalidRequestError

_OPEN = ("in_progress", "incomplete")  # statuses of a last item that the answer continues
_NOTHING: tuple[Any, ...] = (None, [], {}, "")  # values with which an unknown field asks nothing
_FIELDS = {kind: frozenset(ITEMS[kind].__struct_fields__) for kind in ITEMS}
_PART_FIELDS = frozenset(TextPart.__struct_fields__)


def flat_name(namespace: str | None, name: str) -> str:
    """The name of a tool in the chat, where its namespace, if it has one, is part of the name."""
    return f"{namespace}__{name}" if namespace else name


@dataclass(slots=True)
class Turns:
    """The messages that the items have become, and where errors about them should point.

    paths         for each message the path of its first item in the request, such as "input[3]".
    call_paths    (index of the message, index of the call in it) -> path of the call's item.
    is_continued  the answer continues the last message instead of starting a new one.
    """

    messages: list[Message] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    call_paths: dict[tuple[int, int], str] = field(default_factory=dict)
    is_continued: bool = False


class TurnReader:
    """Reads the items of one request in order and builds the messages from them.

    unknown  collects the names of ignored fields and of ignored kinds of items.
    """

    def __init__(self, unknown: Names) -> None:
        self._unknown = unknown
        self._turns = Turns()
        self._assistant: _Assistant | None = None
        self._call_ids: set[str] = set()
        self._num_items = self._num_parts = 0

    def instruct(self, instructions: str) -> None:
        """Add the request's instructions as a system message; called before any `read`."""
        self._add(Message("system", instructions), "instructions")

    def read(self, item: Object, path: str) -> None:
        """Read the next item; `path` is its place in the request, which errors name.

        Raises InvalidRequestError naming the field.
        """
        self._num_items += 1
        if self._num_items > MAX_ITEMS:
            raise InvalidRequestError(
                f"input holds more than {MAX_ITEMS} items, with those of the responses before it",
                "input",
            )
        known = read_item(item, path, self._unknown)
        self._turns.is_continued = False
        if known is None:
            return
        if isinstance(known, ResultItem):
            self._read_result(known, path)
        elif isinstance(known, MessageItem):
            self._read_message(known, path)
        # History.resolve has replaced the references of `input`; any other one has no effect.
        elif not isinstance(known, ReferenceItem):
            self._read_step(known, path)

    def turns(self) -> Turns:
        """Close the last message and return all of them; called once, after the last item."""
        self._end_assistant()
        return self._turns

    def _read_message(self, item: MessageItem, path: str) -> None:
        if item.role not in ITEM_ROLES:
            raise InvalidRequestError(
                f"{path}.role must be one of {', '.join(ITEM_ROLES)}, got {item.role[:40]}",
                f"{path}.role",
            )
        content = self._content(item.content, f"{path}.content")
        if item.role != "assistant":
            self._add(Message(item.role, content), path)
            return
        assistant = self._open_assistant(path)
        assistant.content += [content] if isinstance(content, str) else content
        self._turns.is_continued = item.status in _OPEN

    def _read_step(self, item: ReasoningItem | CallItem | CustomCallItem, path: str) -> None:
        assistant = self._open_assistant(path)
        if isinstance(item, ReasoningItem):
            thought = item.content or item.summary or []
            assistant.reasoning += [_text(part, path) for part in thought]
            self._turns.is_continued = item.status in _OPEN
            return
        arguments = item.arguments if isinstance(item, CallItem) else as_arguments(item.input)
        call = FunctionCall(flat_name(item.namespace, item.name), arguments)
        place = len(self._turns.messages), len(assistant.calls)
        self._turns.call_paths[place] = path
        assistant.calls.append(MessageCall(function=call, id=item.call_id, type="function"))
        self._call_ids.add(item.call_id)

    def _read_result(self, item: ResultItem, path: str) -> None:
        if item.call_id not in self._call_ids:
            raise InvalidRequestError(
                f"{path}.call_id: no call before it has the id {item.call_id[:80]}",
                f"{path}.call_id",
            )
        content = self._content(item.output, f"{path}.output")
        self._add(Message("tool", content, tool_call_id=item.call_id), path)

    def _content(self, content: str | list[TextPart], path: str) -> str | list[str | ContentPart]:
        if isinstance(content, str):
            return content
        self._num_parts += len(content)
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(
                f"input holds more than {MAX_PARTS} content parts in all", "input"
            )
        texts: list[str | ContentPart] = [
            ContentPart("text", _text(part, f"{path}[{i}]")) for i, part in enumerate(content)
        ]
        return _alone(texts)

    def _open_assistant(self, path: str) -> _Assistant:
        if self._assistant is None:
            self._assistant = _Assistant(path)
        return self._assistant

    def _end_assistant(self) -> None:
        assistant, self._assistant = self._assistant, None
        if assistant is not None:
            self._turns.messages.append(assistant.message())
            self._turns.paths.append(assistant.path)

    def _add(self, message: Message, path: str) -> None:
        self._end_assistant()
        self._turns.messages.append(message)
        self._turns.paths.append(path)


@dataclass(slots=True)
class _Assistant:
    """An assistant message that is being built; `path` is that of its first item."""

    path: str
    reasoning: list[str] = field(default_factory=list)
    content: list[str | ContentPart] = field(default_factory=list)
    calls: list[MessageCall] = field(default_factory=list)

    def message(self) -> Message:
        return Message(
            "assistant",
            _alone(self.content) if self.content else None,
            reasoning_content="\n\n".join(self.reasoning) or None,
            tool_calls=self.calls or None,
        )


def read_item(item: Object, path: str, unknown: Names) -> Item | None:
    """Decode one item; None for a kind that this server ignores. Raises InvalidRequestError.

    `unknown` collects the names of ignored fields, and of the kind if that is ignored.
    """
    kind = item.get("type")
    if kind is None:
        kind = "message"
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{path}.type must be a string", f"{path}.type")
    if kind not in ITEMS:
        unknown.add(f"input.{kind[:MAX_NAME_CHARS]}")
        return None
    _note_unknown(item, _FIELDS[kind], "input.", unknown)
    for name in ("content", "output", "summary"):
        parts = item.get(name)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                _note_unknown(part, _PART_FIELDS, f"input.{name}.", unknown)
    try:
        return msgspec.convert(item, ITEMS[kind])
    except msgspec.ValidationError as error:
        raise wrong_type(error, path) from None


def _note_unknown(item: Object, fields: frozenset[str], prefix: str, unknown: Names) -> None:
    for name, value in item.items():
        if name not in fields and value not in _NOTHING:
            unknown.add(prefix + name[:MAX_NAME_CHARS])


def as_arguments(text: str) -> str:
    """The JSON arguments of a chat's call that stand for the plain text of a custom tool's call."""
    return msgspec.json.encode({"input": text}).decode()


def of_arguments(arguments: str) -> str:
    """The plain text in arguments that `as_arguments` made.

    Arguments of any other form, such as those of a call that was cut off, are returned unchanged.
    """
    try:
        return msgspec.json.decode(arguments, type=_PlainText).input
    except msgspec.DecodeError:
        return arguments


class _PlainText(msgspec.Struct, frozen=True):
    input: str


def _text(part: TextPart, path: str) -> str:
    if part.type == "refusal":
        text, name = part.refusal, "refusal"
    elif part.type in TEXT_PARTS:
        text, name = part.text, "text"
    else:
        raise InvalidRequestError(
            f"{path}.type: this server takes text only, one of {', '.join(TEXT_PARTS)} and "
            f"refusal, got {part.type[:40]}",
            f"{path}.type",
        )
    if text is None:
        raise InvalidRequestError(f"{path}.{name} is missing", f"{path}.{name}")
    return text


def _alone(parts: Sequence[str | ContentPart]) -> str | list[str | ContentPart]:
    """Content with a single part becomes a plain string.

    An answer that a client sends back as one part then renders to the same prompt text as a string
    would, and the prefix cache finds it.
    """
    if len(parts) == 1:
        only = parts[0]
        return only if isinstance(only, str) else only.text or ""
    return list(parts)
