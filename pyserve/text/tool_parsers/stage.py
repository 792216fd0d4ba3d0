"""The stage that finds tool calls in the text of an answer, common to all formats.

A format says what begins a call (`Parser.begins`) and reads calls (`Parser.read_calls`). Text that
is not part of a call is content. A call is delivered piece by piece, as soon as its name and the
beginning of its arguments are known. If text turns out not to be a call before that, it is
delivered as content, completely and once. If a call goes wrong later, what was delivered of it
stays a call, and the text from there on is content.
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

MAX_CALLS = 128  # per answer; text after the last of them is content
MAX_FAULTS = 256  # per answer: beginnings that are no calls, each of which is scanned twice
MAX_NAME_CHARS = 256
MAX_WHITE_CHARS = 1024  # white space held back until it is known whether a call follows
_ID_CHARS = string.ascii_letters + string.digits
_WHITE = re.compile(f"[{WHITE}]*")
_CLOSING = re.compile(rf"[{WHITE}\]}}]*")


def plain_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def short_id(num_chars: int) -> str:
    """A random id of `num_chars` letters and digits: Mistral's templates accept only
    ids of nine.
    """
    return "".join(secrets.choice(_ID_CHARS) for _ in range(num_chars))


def fitted_id(given: str, num_chars: int) -> str:
    """The id if it has that form, else one derived from it: another server may have made it.

    num_chars  number of letters and digits; 0: any id will do.
    """
    if num_chars == 0 or (len(given) == num_chars and set(given) <= set(_ID_CHARS)):
        return given
    return hashlib.blake2b(given.encode(), digest_size=num_chars).hexdigest()[:num_chars]


@dataclass(frozen=True, slots=True)
class Tools:
    """What a parser needs to know of a request's tools.

    parameters  tool name -> JSON schema of its arguments.
    max_calls   further calls are dropped: 1 where parallel_tool_calls is false.
    make_id     makes the id of a call for which the text has none; None: as the format does.
    trigger     where a grammar constrains the answer: the text by which the grammar recognises a
                call, so that nothing else is a call; "" if it recognises calls at the start of the
                answer only. None without a grammar.
    """

    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_calls: int = MAX_CALLS
    make_id: Callable[[], str] | None = None
    trigger: str | None = None


class Parser(ABC):
    """A Stage for one answer.

    markers  texts that begin calls, and are consumed before `read_calls`.
    starts   texts that begin calls anywhere, and are left for `read_calls` to read.
    bare     characters that begin calls without a marker, at the start of the text only. Other
             texts may begin with them too, so such a call must name one of the request's tools.
    closers  texts that may follow calls, and are dropped as markup.
    """

    markers: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    bare: str = ""
    closers: tuple[str, ...] = ()
    make_id: Callable[[], str] = staticmethod(plain_id)
    # When the text ends within a call: whether the rest that was not delivered belongs to its
    # arguments, or is content.
    is_rest_json: ClassVar[bool] = True

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
        """Text to search for -> the element of `begins` that it is, or begins with."""
        trigger = self.tools.trigger
        if trigger is None:
            return {text: text for text in self.begins}
        if trigger in self.starts:  # a marker may precede it, and is dropped as markup
            return {text: text for text in (*self.markers, trigger)}
        marker = next((text for text in self.markers if trigger.startswith(text)), None)
        return {} if marker is None else {trigger: marker}

    @abstractmethod
    def read_calls(self, *, is_bare: bool) -> Reader[None]:
        """Read the calls from a marker to their end, by means of `open`, `say` and `close`. Raises
        Fault where the text is not a call.
        """

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
        """Begin a call; what was held of it until now is dropped as markup. Raises Fault if it
        cannot be a call.
        """
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
        """Deliver the next piece of the open call's arguments, and mark as delivered all that was
        read.
        """
        if arguments:
            self._add(ToolCall(self._num_calls - 1, arguments=arguments))
        self.source.settle()

    def close(self) -> None:
        """End the open call: its arguments are complete."""
        self.source.is_open = False
        self.source.settle()

    def _add(self, part: Part) -> None:
        if not isinstance(part, ToolCall) or part.index < self.tools.max_calls:
            self._parts.append(part)

    def _deliver(self, end: int) -> None:
        """Deliver all text up to position `end` as content."""
        source = self.source
        if end > source.settled:
            self._parts.append(Content(source.text[source.settled : end]))
            self._is_after_call = False
        source.position = end
        source.settle()

    def _take(self) -> list[Part]:
        """The parts found by one push, with neighbours of the same kind joined."""
        parts = self._parts if len(self._parts) < 2 else joined(self._parts)
        self._parts = []
        if self._tokens and (parts or self.source.is_ended):
            first = parts[0] if parts else Content("")
            parts[:1] = [msgspec.structs.replace(first, tokens=self._tokens)]
            self._tokens = ()
        return parts

    def _read(self) -> Reader[None]:
        """Read the whole text: content, calls, content and so on."""
        source = self.source
        is_start = True
        while (begin := (yield from self._read_content(is_start))) is not None:
            is_start = False
            num_calls = self._num_calls
            num_read = source.num_held + len(begin)  # the held text is white space before it
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
        """Deliver content up to the beginning of a call, and return what begins it; None once the
        text has ended.

        White space around calls is markup, so it is held back until it is known what follows it.
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
        """What begins the next call, or None if no call has begun. Content before it is
        delivered.
        """
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
        """Number of characters at the end of the text that may become the beginning of a call."""
        match = self._search_first(text, max(start, len(text) - self._max_begin + 1))
        if match is not None:
            for at in range(match.start(), len(text)):
                if text[at:] in self._beginnings:
                    return len(text) - at
        return 0

    def _read_closers(self) -> Reader[None]:
        """Skip a closer after the calls, with white space and surplus closing brackets
        before it.
        """
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
        """Deliver what is left when the text has ended within the arguments of a call."""
        source = self.source
        rest = source.text[source.settled :]
        source.position = len(source.text)
        if self.is_rest_json:
            self.say(rest)
        elif rest:
            self._deliver(len(source.text))
