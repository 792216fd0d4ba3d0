"""JSON that is checked and passed on as it comes, before its end is there.

What comes out is valid JSON, in the writer's own words. Two things that models write and JSON does
not have are mended: control characters within strings, and escapes that do not exist.
"""

from __future__ import annotations

import json
import re

from pyserve.text.tool_parsers.source import Ended, Fault, Reader, Sink, Source

MAX_DEPTH = 64  # of lists and objects
MAX_SCALAR_CHARS = 512  # of a number
_CLOSER = {"{": "}", "[": "]"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_CHARS = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_UNICODE = re.compile(r"\\u[0-9a-fA-F]{4}")
_BEGUN_UNICODE = re.compile(r"\\u[0-9a-fA-F]{0,3}\Z")


def quoted(text: str) -> str:
    """A JSON string, without its quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def read_value(source: Source, sink: Sink) -> Reader[None]:
    """One value, from its first character on. Raises Fault at what is not JSON."""
    closers: list[str] = []
    while True:
        first = yield from source.peek()
        if first in _CLOSER:
            sink(source.advance(1))
            closers.append(_CLOSER[first])
            if len(closers) > MAX_DEPTH:
                raise Fault
            yield from _white(source, sink)
            if (yield from source.peek()) != closers[-1]:
                if first == "{":
                    yield from _read_key(source, sink)
                continue
        elif first == '"':
            yield from read_string(source, sink)
        else:
            sink((yield from _read_scalar(source)))
        if not (yield from _read_behind(source, sink, closers)):
            return


def _read_behind(source: Source, sink: Sink, closers: list[str]) -> Reader[bool]:
    """What follows a value, up to the next one; False: nothing, the outermost value has ended."""
    while closers:
        yield from _white(source, sink)
        char = yield from source.peek()
        if char == closers[-1]:
            sink(source.advance(1))
            closers.pop()
        elif char == ",":
            sink(source.advance(1))
            yield from _white(source, sink)
            if closers[-1] == "}":
                yield from _read_key(source, sink)
            return True
        else:
            raise Fault
    return False


def _white(source: Source, sink: Sink) -> Reader[None]:
    white = yield from source.skip_white()
    if white:
        sink(white)


def _read_key(source: Source, sink: Sink) -> Reader[None]:
    """A key, its colon and the white space behind it."""
    yield from read_string(source, sink)
    yield from _white(source, sink)
    if (yield from source.peek()) != ":":
        raise Fault
    sink(source.advance(1))
    yield from _white(source, sink)


def _read_scalar(source: Source) -> Reader[str]:
    start = source.position - source.settled
    text = yield from source.run(_SCALAR_CHARS, MAX_SCALAR_CHARS)
    if not _SCALAR.fullmatch(text):
        source.position = source.settled + start
        raise Fault
    return text


def read_string(source: Source, sink: Sink) -> Reader[None]:
    """A string, its quotes included."""
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
    return "" if text[1] == "'" else "\\\\"  # the character that follows stands for itself
