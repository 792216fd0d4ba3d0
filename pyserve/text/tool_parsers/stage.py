"""The stage that finds tool calls in the text of an answer, for every format.

A format says where calls begin (`Parser.begins`) and reads them (`Parser.read_calls`). What is
common stands here. Text that is no call is content. A call is delivered as it comes, from the
moment that its name and the beginning of its arguments are known; what turns out not to be a call
before that is content, once and whole. A call that goes wrong later keeps what was delivered of it,
and the text goes on as content from there.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from pyserve.text.parts import Content, Part, ToolCall, joined
from pyserve.text.tool_parsers.source import WHITE, Ended, Fault, Reader, Source

MAX_CALLS = 128  # of one answer; what follows is content
MAX_FAULTS = 256  # of one answer: beginnings that are no calls, each looked at twice
MAX_NAME_CHARS = 256
MAX_WHITE_CHARS = 1024  # held back until it is known whether a call follows
_ID_CHARS = string.ascii_letters + string.digits
_WHITE = re.compile(f"[{WHITE}]*")
_CLOSING = re.compile(rf"[{WHITE}\]}}]*")


def plain_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def short_id(num_chars: int) -> str:
    """So many letters or digits: Mistral's templates refuse any id that is not nine of them."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(num_chars))


def fitted_id(given: str, num_chars: int) -> str:
    """The same id in that form, also where it was made by another server."""
    if num_chars == 0 or (len(given) == num_chars and set(given) <= set(_ID_CHARS)):
        return given
    return hashlib.blake2b(given.encode(), digest_size=num_chars).hexdigest()[:num_chars]


@dataclass(frozen=True, slots=True)
class Tools:
    """What a parser is told of the request's tools.

    parameters  name -> JSON schema of its arguments.
    max_calls   further calls are dropped: 1 without parallel_tool_calls.
    make_id     the id of a call that the text gives none.
    trigger     a grammar knows calls by this, or "" by how the answer begins, so that nothing else
                is one; None: no grammar does.
    """

    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_calls: int = MAX_CALLS
    make_id: Callable[[], str] | None = None
    trigger: str | None = None


class Parser(ABC):
    """Of one answer; a Stage.

    markers  begin calls, and are read before `read_calls`.
    starts   begin calls without a marker, anywhere in the text, and are left to `read_calls`.
    bare     characters that begin calls without a marker at the start of the text. They also begin
             other texts, so that such a call must name one of the request's tools.
    closers  may stand behind calls; markup.
    """

    markers: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    bare: str = ""
    closers: tuple[str, ...] = ()
    make_id: Callable[[], str] = staticmethod(plain_id)
    is_rest_json: ClassVar[bool] = True  # what is left of arguments at the end of the text

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        if tools.trigger:
            self.bare = ""
        self.source = Source()
        self._begin_of = self._begins_by_text()
        texts = tuple(self._begin_of)
        self._begin = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self._max_begin = max(map(len, texts), default=1)
        first = "".join(sorted({re.escape(text[0]) for text in texts}))
        self._search_first = re.compile(f"[{first}]" if first else "(?!)").search
        self._parts: list[Part] = []
        self._tokens: tuple[Any, ...] = ()
        self._num_calls = 0
        self._num_faults = 0
        self._is_after_call = False
        self._reading = self._read()
        next(self._reading)

    @property
    def begins(self) -> tuple[str, ...]:
        return (*self.markers, *self.starts)

    def _begins_by_text(self) -> dict[str, str]:
        """What is looked for -> what of `begins` that is, or begins with."""
        trigger = self.tools.trigger
        if trigger is None:
            return {text: text for text in self.begins}
        if trigger in self.starts:  # markers may stand in front of it, and are markup then
            return {text: text for text in (*self.markers, trigger)}
        marker = next((text for text in self.markers if trigger.startswith(text)), None)
        return {} if marker is None else {trigger: marker}

    @abstractmethod
    def read_calls(self, *, is_bare: bool) -> Reader[None]:
        """Read the calls behind a marker, up to their end, by open, say and close."""

    def push(self, content: Content) -> Sequence[Part]:
        self._tokens += content.tokens
        self.source.feed(content.text)
        next(self._reading)
        return self._take()

    def flush(self) -> Sequence[Part]:
        self.source.is_ended = True
        next(self._reading, None)
        return self._take()

    def open(self, name: str, *, call_id: str | None = None, is_bare: bool = False) -> None:
        """A call begins, and what was held of it is markup. Raises Fault where it cannot be one."""
        if not 1 <= len(name) <= MAX_NAME_CHARS or self._num_calls == MAX_CALLS:
            raise Fault
        if is_bare and name not in self.tools.parameters:
            raise Fault
        make_id = self.tools.make_id or self.make_id
        self._num_calls += 1
        self._add(ToolCall(self._num_calls - 1, call_id or make_id(), name))
        self.source.is_open = True
        self.source.settle()

    def say(self, arguments: str) -> None:
        """The next piece of the open call's arguments; all that was read is delivered by it."""
        if arguments:
            self._add(ToolCall(self._num_calls - 1, arguments=arguments))
        self.source.settle()

    def close(self) -> None:
        """The open call has all of its arguments."""
        self.source.is_open = False
        self.source.settle()

    def _add(self, part: Part) -> None:
        if not isinstance(part, ToolCall) or part.index < self.tools.max_calls:
            self._parts.append(part)

    def _deliver(self, end: int) -> None:
        """All up to a position is content."""
        source = self.source
        if end > source.settled:
            self._parts.append(Content(source.text[source.settled : end]))
            self._is_after_call = False
        source.position = end
        source.settle()

    def _take(self) -> list[Part]:
        """The parts of one push, neighbours of one kind put together."""
        parts = self._parts if len(self._parts) < 2 else joined(self._parts)
        self._parts = []
        if self._tokens and (parts or self.source.is_ended):
            first = parts[0] if parts else Content("")
            parts[:1] = [msgspec.structs.replace(first, tokens=self._tokens)]
            self._tokens = ()
        return parts

    def _read(self) -> Reader[None]:
        """The whole text: content, calls, content."""
        source = self.source
        is_start = True
        while (begin := (yield from self._read_content(is_start))) is not None:
            is_start = False
            num_calls = self._num_calls
            num_read = source.num_held + len(begin)  # white space stands in front of it
            try:
                if begin in self.markers:
                    source.advance(len(begin))
                yield from self.read_calls(is_bare=begin not in self.begins)
                source.settle()
            except Fault as fault:
                if self._num_calls == num_calls:
                    self._num_faults += 1
                    self._deliver(source.settled + num_read)
                    continue
                if source.is_open and isinstance(fault, Ended):
                    self._end_arguments()
            source.is_open = False
            source.position = source.settled
            self._is_after_call = True
            yield from self._read_closers()

    def _read_content(self, is_start: bool) -> Reader[str | None]:
        """Deliver content up to what begins a call, and return that; None: the text has ended.

        White space around calls is markup: it is held back until it is known what follows.
        """
        source = self.source
        while is_start and self.bare:
            white = _WHITE.match(source.text)
            assert white is not None
            at = white.end()
            if at > MAX_WHITE_CHARS or at == len(source.text) and source.is_ended:
                break
            if at < len(source.text):
                if source.text[at] not in self.bare:
                    break
                source.position = at
                return source.text[at]
            yield
        while True:
            found = self._find_begin()
            if found is not None or source.is_ended:
                return found
            yield

    def _find_begin(self) -> str | None:
        """What begins the next call; the content in front of it is delivered, as far as it goes."""
        source = self.source
        text, start = source.text, source.settled
        is_over = self._num_faults >= MAX_FAULTS
        found = None if is_over else self._begin.search(text, start)
        if found is not None:
            end = found.start()
        else:
            end = len(text) - (0 if source.is_ended or is_over else self._num_begun(text, start))
        content_end = start + len(text[start:end].rstrip(WHITE))
        content_end += (end - content_end) // MAX_WHITE_CHARS * MAX_WHITE_CHARS
        self._deliver(content_end)
        if found is not None:
            source.position = end
            return self._begin_of[found[0]]
        if source.is_ended and not self._is_after_call:
            self._deliver(end)
        return None

    def _num_begun(self, text: str, start: int) -> int:
        """Characters at the end of the text that may become something that begins a call."""
        match = self._search_first(text, max(start, len(text) - self._max_begin + 1))
        if match is not None:
            for at in range(match.start(), len(text)):
                if text[at:] in self._beginnings:
                    return len(text) - at
        return 0

    def _read_closers(self) -> Reader[None]:
        """Pass over what closes calls, also where there is too much of it."""
        source = self.source
        while True:
            match = _CLOSING.match(source.text, source.settled)
            assert match is not None
            length = len(match[0])
            if length > MAX_WHITE_CHARS:
                return
            if match.end() < len(source.text):
                break
            if source.is_ended:
                source.position = match.end()
                source.settle()
                return
            yield
        source.position = source.settled + length
        try:
            for closer in self.closers:
                if (yield from source.accept(closer)):
                    source.settle()
                    return
        except Ended:
            pass
        source.position = source.settled

    def _end_arguments(self) -> None:
        """The text has ended within the arguments of a call."""
        source = self.source
        rest = source.text[source.settled :]
        source.position = len(source.text)
        if self.is_rest_json:
            self.say(rest)
        elif rest:
            self._deliver(len(source.text))
