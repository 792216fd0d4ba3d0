"""The Responses API's answer: parts of the generated text -> output items, events and the response.

`Output` builds the items of an answer in one place, streamed or not. A stream sends an event for
each step of the building; a whole answer sends none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from pyserve.api.endpoints.answer import Head
from pyserve.api.endpoints.responses_history import item_id
from pyserve.api.endpoints.responses_items import of_arguments
from pyserve.api.endpoints.responses_request import Asked, shown_again
from pyserve.api.endpoints.responses_tools import ToolName
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.stream import COMMENT
from pyserve.api.wire.encoding import encode_line
from pyserve.api.wire.logprobs import TokenLogprob
from pyserve.api.wire.protocol import ErrorDetail, Usage
from pyserve.api.wire.responses_answer import (
    Event,
    IncompleteDetails,
    OutputCall,
    OutputCustomCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
    SummaryText,
)
from pyserve.errors import ContextError, QueueFullError, RequestError
from pyserve.text.parts import Content, Part, Reasoning, ToolCall, joined

Kind = Literal["message", "reasoning", "function_call", "custom_tool_call"]
Tell = Callable[..., None]  # called with an event's type and its other fields
_MADE_OF: dict[Kind, type[Part]] = {
    "message": Content, "reasoning": Reasoning, "function_call": ToolCall,
}  # fmt: skip
_HOLE = b"\0"  # JSON text never contains this byte, so encoded JSON can be split at it


class Keep(Protocol):
    """Takes the JSON of a response that has ended, to store it; with its events if they may be
    streamed again."""

    def __call__(self, head: Head, data: bytes, events: Sequence[bytes] = ()) -> None: ...


@dataclass(frozen=True, slots=True)
class Answering:
    """What every response object of one answer is made from, from its first event to its last.

    asked               the request.
    temperature, top_p  the values that the answer is sampled with.
    is_kept             the response is stored; the `store` field reports it.
    keep                stores the response; called before the complete response is sent.
    """

    asked: Asked
    temperature: float
    top_p: float
    is_kept: bool
    keep: Keep

    def response(self, head: Head, output: Sequence[OutputItem], **fields: Any) -> Response:
        """The response object with the items so far; `fields` has its status and further fields."""
        return Response(
            id=head.id,
            created_at=head.created,
            model=head.model,
            output=list(output),
            store=self.is_kept,
            temperature=self.temperature,
            top_p=self.top_p,
            **shown_again(self.asked.body),
            **fields,
        )

    def ended(
        self, head: Head, output: Sequence[OutputItem], usage: Usage, reason: str
    ) -> Response:
        """The response object of an answer that has ended.

        `reason` is the finish reason of its sequence: "length" makes the response incomplete,
        "abort" cancelled, and any other completed.
        """
        status = status_of(reason)
        return self.response(
            head,
            output,
            status=status,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details=(
                IncompleteDetails("max_output_tokens") if status == "incomplete" else None
            ),
            usage=ResponseUsage.of(usage),
        )


def status_of(reason: str | None) -> str:
    """The status of a response whose sequence has this finish reason."""
    return {"length": "incomplete", "abort": "cancelled"}.get(reason or "", "completed")


def _tell_nobody(type: str, **fields: Any) -> None:
    """The `Tell` of an answer that is not streamed: it drops the events."""


class Output:
    """Builds the output items of one answer from its parts, in the order in which they come.

    items  the items that are complete.
    """

    def __init__(self, response_id: str, asked: Asked, tell: Tell = _tell_nobody) -> None:
        self.items: list[OutputItem] = []
        self._response_id = response_id
        self._names = asked.tools.names
        self._has_summaries = asked.has_summaries
        self._tell = tell
        self._open: _OpenItem | None = None
        # Logprobs of tokens that have completed no text yet; the next text delta carries them.
        self._held: list[TokenLogprob] = []

    def extend(self, part: Part) -> _OpenItem | None:
        """Add `part` to the open item if it only continues its text, and return that item.

        Returns None and changes nothing if `part` needs `push`: it starts another item, has no
        text, or there are logprobs to report. The caller sends the delta event itself.
        """
        item = self._open
        if item is None or part.__class__ is not item.made_of or part.tokens or self._held:
            return None
        if not isinstance(part, ToolCall):
            text = part.text
        elif part.name is None:
            text = part.arguments
        else:
            return None
        if not text:
            return None
        item.texts.append(text)
        return item

    def push(self, choice: Choice, part: Part) -> None:
        """Add the next part, opening and closing items as needed, and send the events for it."""
        if isinstance(part, ToolCall):
            self._push_call(part)
        elif isinstance(part, Reasoning):
            if part.text:
                self._push_reasoning(part.text)
        else:
            told = choice.words.chat(part.tokens) if choice.words and part.tokens else None
            logprobs = told.content if told is not None else []
            self._push_text(part.text, logprobs)

    def end(self, reason: str | None) -> None:
        """Close the last item; no part follows. An answer without items gets one empty message."""
        if self._open is None and not self.items:
            self._open_item("message")
        self._close("completed" if status_of(reason) == "completed" else "incomplete")

    def _push_text(self, text: str, logprobs: list[TokenLogprob]) -> None:
        self._held += logprobs
        is_open = self._open is not None and self._open.kind == "message"
        if not text and not (is_open and self._held):
            return
        logprobs, self._held = self._held, []
        item = self._open_item("message")
        item.texts.append(text)
        item.logprobs += logprobs
        self._tell(delta=text, **{**self.delta_of(item), "logprobs": logprobs})

    def _push_reasoning(self, text: str) -> None:
        item = self._open_item("reasoning")
        item.texts.append(text)
        self._tell(delta=text, **self.delta_of(item))

    def _push_call(self, part: ToolCall) -> None:
        item = self._open
        if part.name is not None or item is None or item.call is None:
            name = self._names.get(part.name or "", ToolName(part.name or "", None))
            kind: Kind = "custom_tool_call" if name.is_custom else "function_call"
            item = self._open_item(kind, part, name)
        if not part.arguments:
            return
        item.texts.append(part.arguments)
        # The plain text of a custom call is only known when the JSON around it is complete, so its
        # one delta is sent by `_close`.
        if item.kind == "function_call":
            self._tell(delta=part.arguments, **self.delta_of(item))

    @property
    def _thought(self) -> str:
        return "reasoning_summary_text" if self._has_summaries else "reasoning_text"

    def _open_item(
        self, kind: Kind, call: ToolCall | None = None, name: ToolName | None = None
    ) -> _OpenItem:
        """The open item if it has this kind and `call` starts no new call; else a new item."""
        if self._open is not None and self._open.kind == kind and call is None:
            return self._open
        self._close("completed")
        index = len(self.items)
        item = _OpenItem(kind, item_id(kind, self._response_id, index), index, call=call, name=name)
        self._open = item
        self._tell(
            "response.output_item.added",
            output_index=index,
            item=self._item(item, "in_progress", is_new=True),
        )
        self._tell_part("added", item, "")
        return item

    def _close(self, status: str) -> None:
        item, self._open = self._open, None
        if item is None:
            return
        text = "".join(item.texts)
        if item.kind == "message":
            self._tell(
                "response.output_text.done", item_id=item.id, output_index=item.index,
                content_index=0, text=text, logprobs=item.logprobs,
            )  # fmt: skip
        elif item.kind == "reasoning":
            self._tell(
                f"response.{self._thought}.done", item_id=item.id, output_index=item.index,
                text=text, **self._place(item),
            )  # fmt: skip
        elif item.kind == "function_call":
            assert item.name is not None
            self._tell(
                "response.function_call_arguments.done", item_id=item.id, output_index=item.index,
                name=item.name.name, arguments=text,
            )  # fmt: skip
        else:
            plain = of_arguments(text)
            self._tell(delta=plain, **self.delta_of(item))
            self._tell(
                "response.custom_tool_call_input.done", item_id=item.id, output_index=item.index,
                input=plain,
            )  # fmt: skip
        self._tell_part("done", item, text)
        done = self._item(item, status)
        self._tell("response.output_item.done", output_index=item.index, item=done)
        self.items.append(done)

    def delta_of(self, item: _OpenItem) -> dict[str, Any]:
        """The fields of the event for one more piece of the item's text, except the text itself."""
        kind = {
            "message": "output_text", "reasoning": self._thought,
            "function_call": "function_call_arguments",
            "custom_tool_call": "custom_tool_call_input",
        }[item.kind]  # fmt: skip
        return {
            "type": f"response.{kind}.delta", "item_id": item.id, "output_index": item.index,
            **self._place(item), **({"logprobs": []} if item.kind == "message" else {}),
        }  # fmt: skip

    def _tell_part(self, step: str, item: _OpenItem, text: str) -> None:
        """Send the event that a content part was added or is done. Calls have no content parts."""
        if item.call is not None:
            return
        name = "reasoning_summary_part" if "summary_index" in self._place(item) else "content_part"
        part: OutputText | ReasoningText | SummaryText
        if item.kind == "message":
            part = OutputText(text=text, logprobs=item.logprobs if step == "done" else [])
        else:
            part = SummaryText(text) if self._has_summaries else ReasoningText(text)
        self._tell(
            f"response.{name}.{step}", item_id=item.id, output_index=item.index, part=part,
            **self._place(item),
        )  # fmt: skip

    def _place(self, item: _OpenItem) -> dict[str, int]:
        """The index of a text in its item: 0, as each item has only one text; none for calls."""
        if item.call is not None:
            return {}
        if item.kind == "reasoning" and self._has_summaries:
            return {"summary_index": 0}
        return {"content_index": 0}

    def _item(self, item: _OpenItem, status: str, *, is_new: bool = False) -> OutputItem:
        text = "".join(item.texts)
        if item.kind == "message":
            content = [] if is_new else [OutputText(text=text, logprobs=item.logprobs)]
            return OutputMessage(id=item.id, status=status, content=content)
        if item.kind == "reasoning":
            if self._has_summaries:
                summary = [] if is_new else [SummaryText(text)]
                return OutputReasoning(id=item.id, status=status, summary=summary)
            thought = [] if is_new else [ReasoningText(text)]
            return OutputReasoning(id=item.id, status=status, summary=[], content=thought)
        assert item.call is not None and item.name is not None
        named: dict[str, Any] = {
            "id": item.id, "status": status, "call_id": item.call.id or item.id,
            "name": item.name.name, "namespace": item.name.namespace or msgspec.UNSET,
        }  # fmt: skip
        if item.kind == "function_call":
            return OutputCall(**named, arguments=text)
        return OutputCustomCall(**named, input="" if is_new else of_arguments(text))


@dataclass(slots=True)
class _OpenItem:
    """An item that is being built.

    index    its place in the output.
    texts    the pieces of its text, or of the JSON arguments of its call.
    call     the first piece of the call, with its id; None for messages and reasoning.
    name     the called tool as the client knows it; None likewise.
    made_of  the type of the parts that continue the item with one delta event each; None for custom
             calls, which send one delta when they are complete.
    """

    kind: Kind
    id: str
    index: int
    texts: list[str]
    logprobs: list[TokenLogprob]
    call: ToolCall | None
    name: ToolName | None

    def __init__(
        self, kind: Kind, id: str, index: int, *, call: ToolCall | None, name: ToolName | None
    ) -> None:
        self.kind, self.id, self.index, self.call, self.name = kind, id, index, call, name
        self.texts, self.logprobs = [], []

    @property
    def made_of(self) -> type[Part] | None:
        return _MADE_OF.get(self.kind)


class ResponseFrames:
    """The server-sent events of a streamed response, numbered from 0.

    A delta event is encoded once for each item, with holes for its number and text; one more piece
    of the text then costs no more than the encoding of that text. There is no final [DONE].
    """

    def __init__(self, answering: Answering, head: Head) -> None:
        self._answering = answering
        self._head = head
        self._number = 0
        self._frames: list[bytes] = []
        self._output = Output(head.id, answering.asked, self._tell)
        self._reason: str | None = None
        # The encoded delta event of _cut_item, cut at the places of its number and its text.
        self._cut_item: _OpenItem | None = None
        self._cuts: list[bytes] = []

    def begin(self) -> bytes:
        """Two events that give the client the response's id while the request may still wait."""
        response = self._answering.response(self._head, [], status="in_progress")
        self._tell("response.created", response=response)
        self._tell("response.in_progress", response=response)
        return self._take()

    def first(self, choice: Choice) -> bytes:
        """Nothing is sent before the first part."""
        return b""

    def part(self, choice: Choice, part: Part) -> bytes:
        """The events for one part of the answer, possibly none."""
        item = self._output.extend(part)
        if item is None:
            self._output.push(choice, part)
            return self._take()
        if item is not self._cut_item:
            self._cut(item)
        number, self._number = self._number, self._number + 1
        before, between, behind = self._cuts
        return b"%b%d%b%b%b" % (before, number, between, encode_line(item.texts[-1]), behind)

    def finish(self, choice: Choice, last: Part | None) -> bytes:
        """The events for the last part and for the end of the last item."""
        if last is not None:
            self._output.push(choice, last)
        self._reason = choice.finish_reason
        self._output.end(self._reason)
        return self._take()

    def end(self, usage: Usage) -> bytes:
        """The final event, which has the complete response; the response is stored first."""
        answering, head = self._answering, self._head
        reason = self._reason or "stop"
        response = answering.ended(head, self._output.items, usage, reason)
        if answering.is_kept:
            answering.keep(head, msgspec.json.encode(response))
        self._tell(f"response.{response.status}", response=response)
        return self._take()

    def failed(self, error: RequestError) -> bytes:
        """The events of a failure: response.failed, and `error`, which some clients look for."""
        response = self._answering.response(
            self._head, self._output.items, status="failed", error=response_error(error)
        )
        if self._answering.is_kept:
            self._answering.keep(self._head, msgspec.json.encode(response))
        self._tell("response.failed", response=response)
        detail = ErrorDetail(error.message, error.type, error.param, error.status)
        self._tell(
            "error", code=response_error(error).code, message=error.message, param=error.param,
            error=detail,
        )  # fmt: skip
        return self._take()

    def cancelled(self, usage: Usage) -> bytes:
        """The JSON of the response, up to where its client cancelled it."""
        self._output.end("abort")
        response = self._answering.ended(self._head, self._output.items, usage, "abort")
        return msgspec.json.encode(response)

    def keep_alive(self, choices: Sequence[Choice]) -> bytes:
        """A comment, as this API has no event for keeping a connection alive."""
        return COMMENT

    def _cut(self, item: _OpenItem) -> None:
        """Encode the delta event of `item` and cut it where its number and its text belong."""
        hole: Any = msgspec.Raw(_HOLE)
        fields = self._output.delta_of(item)
        data = encode_line(Event(sequence_number=hole, delta=hole, **fields))
        self._cuts = (b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), data)).split(_HOLE)
        self._cut_item = item

    def _tell(self, type: str, **fields: Any) -> None:
        event = Event(type=type, sequence_number=self._number, **fields)
        self._number += 1
        self._frames.append(b"event: %b\ndata: %b\n\n" % (type.encode(), encode_line(event)))

    def _take(self) -> bytes:
        frames, self._frames = self._frames, []
        return b"".join(frames)


def response_error(error: RequestError) -> ResponseError:
    """The error under OpenAI's codes, by which clients decide whether to retry."""
    code = "invalid_prompt" if error.status < 429 else "server_error"
    if isinstance(error, QueueFullError):
        code = "rate_limit_exceeded"
    if isinstance(error, ContextError):
        code = "context_length_exceeded"
    return ResponseError(code, error.message)


def encode_response(answering: Answering, head: Head, generation: Generation) -> bytes:
    """The JSON of the response to a request that is not streamed."""
    choice = generation.choices[0]
    output = Output(head.id, answering.asked)
    for part in joined(choice.parts):
        output.push(choice, part)
    output.end(choice.finish_reason)
    reason = choice.finish_reason or "stop"
    response = answering.ended(head, output.items, generation.usage(), reason)
    return msgspec.json.encode(response)
