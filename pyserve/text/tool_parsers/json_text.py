"""JSON that is checked and passed on while it arrives.

The output is valid JSON in the model's own wording. Two faults that models make are mended: control
characters within strings, and escapes that do not exist.
"""

from __future__ import annotations

import json
import re

from pyserve.text.tool_parsers.source import Ended, Fault, Reader, Sink, Source
from pyserve.text.tool_parsers.values import MAX_SCALAR_CHARS, ValueReader

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_CHARS = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_UNICODE = re.compile(r"\\u[0-9a-fA-F]{4}")
_BEGUN_UNICODE = re.compile(r"\\u[0-9a-fA-F]{0,3}\Z")


def quoted(text: str) -> str:
    """A text as a JSON string, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def read_value(source: Source, sink: Sink) -> Reader[None]:
    """Read one JSON value from its first character on. Raises Fault if it is not JSON."""
    yield from _JsonReader(source, sink).read()


class _JsonReader(ValueReader):
    def white(self) -> Reader[None]:
        white = yield from self.source.skip_white()
        if white:
            self.sink(white)

    def comma(self, closer: str) -> Reader[bool]:
        char = yield from self.source.peek()
        if char == closer:
            return False
        if char != ",":
            raise Fault
        self.sink(self.source.advance(1))
        yield from self.white()
        return True

    def key(self) -> Reader[None]:
        yield from self.string()
        yield from self.white()
        if (yield from self.source.peek()) != ":":
            raise Fault
        self.sink(self.source.advance(1))
        yield from self.white()

    def string(self) -> Reader[None]:
        yield from read_string(self.source, self.sink)

    def scalar(self) -> Reader[None]:
        source = self.source
        start = source.position - source.settled
        text = yield from source.run(_SCALAR_CHARS, MAX_SCALAR_CHARS)
        if not _SCALAR.fullmatch(text):
            source.position = source.settled + start
            raise Fault
        self.sink(text)


def read_string(source: Source, sink: Sink) -> Reader[None]:
    """Read a JSON string with its quotes. Raises Fault if none comes."""
    if (yield from source.peek()) != '"':
        raise Fault
    sink(source.advance(1))
    while True:
        match = _PLAIN.match(source.text, source.position)
        if match is not None and match[0]:
            sink(source.advance(len(match[0])))
        char = yield from source.peek()
        if char == '"':
            sink(source.advance(1))
            return
        if char == "\\":
            sink((yield from _read_escape(source)))
        elif char < " ":
            sink(quoted(source.advance(1)))


def _read_escape(source: Source) -> Reader[str]:
    while True:
        text = source.text[source.position : source.position + 6]
        if len(text) > 1 and (text[1] != "u" or not _BEGUN_UNICODE.match(text)):
            break
        if source.is_ended:
            raise Ended
        yield
    if text[1] in '"\\/bfnrt':
        return source.advance(2)
    if _UNICODE.match(text):
        return source.advance(6)
    source.advance(1)
    # An unknown escape: its backslash is escaped, or dropped before '.
    return "" if text[1] == "'" else "\\\\"
