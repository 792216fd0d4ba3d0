"""Python literals -> JSON, while they arrive.

Accepted is what models write as arguments: strings, which may span several lines, numbers, True,
False, None and their JSON spellings, lists and dicts. Nothing is evaluated, and anything else is a
Fault.
"""

from __future__ import annotations

import re

from pyserve.text.tool_parsers.json_text import quoted
from pyserve.text.tool_parsers.source import Ended, Fault, Reader, Sink, Source
from pyserve.text.tool_parsers.values import MAX_SCALAR_CHARS, ValueReader

_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORDS |= {word: word for word in _WORDS.values()}
_SCALAR_CHARS = re.compile(r"[-+._0-9A-Za-z]*")
_NUMBER = re.compile(r"([-+]?)(?:([0-9]+(?:_[0-9]+)*)(\.[0-9]*)?|(\.[0-9]+))((?:[eE][-+]?[0-9]+)?)")
_PLAIN = {quote: re.compile(rf"[^\\{quote}]*") for quote in "'\""}
_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0",
    "\\": "\\", "'": "'", '"': '"', "/": "/", "\n": "",
}  # fmt: skip
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile(r"[0-9a-fA-F]*")


def read_literal(source: Source, sink: Sink) -> Reader[None]:
    """Read one literal from its first character on, and write it to `sink` as JSON.
    Raises Fault.
    """
    yield from source.skip_white()
    yield from _LiteralReader(source, sink).read()


class _LiteralReader(ValueReader):
    quotes = "'\""

    def white(self) -> Reader[None]:
        yield from self.source.skip_white()

    def comma(self, closer: str) -> Reader[bool]:
        has_comma = yield from self.source.accept(",")  # a comma may precede the closer
        yield from self.source.skip_white()
        if (yield from self.source.peek()) == closer:
            return False
        if not has_comma:
            raise Fault
        self.sink(", ")
        return True

    def key(self) -> Reader[None]:
        yield from self.string()
        yield from self.source.skip_white()
        yield from self.source.expect(":")
        self.sink(": ")
        yield from self.source.skip_white()

    def string(self) -> Reader[None]:
        yield from read_string(self.source, self.sink)

    def scalar(self) -> Reader[None]:
        text = yield from self.source.run(_SCALAR_CHARS, MAX_SCALAR_CHARS)
        word = _WORDS.get(text) or _json_number(text)
        if word is None:
            self.source.position -= len(text)
            raise Fault
        self.sink(word)


def _json_number(text: str) -> str | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, fraction, bare_fraction, exponent = match.groups()
    whole = (whole or "0").replace("_", "").lstrip("0") or "0"
    fraction = bare_fraction or fraction or ""
    if fraction == ".":
        fraction = ".0"
    return f"{sign if sign == '-' else ''}{whole}{fraction}{exponent}"


def read_string(source: Source, sink: Sink) -> Reader[None]:
    """Read a string in any of Python's quotes, without a prefix. Raises Fault."""
    quote = yield from source.peek()
    if quote not in "'\"":
        raise Fault
    source.advance(1)
    end = quote
    if (yield from source.peek()) == quote:  # an empty string, or triple quotes
        source.advance(1)
        if not (yield from _follows(source, quote)):
            sink('""')
            return
        source.advance(1)
        end = 3 * quote
    sink('"')
    plain = _PLAIN[quote]
    while True:
        match = plain.match(source.text, source.position)
        if match is not None and match[0]:
            sink(quoted(source.advance(len(match[0]))))
        char = yield from source.peek()
        if char == "\\":
            sink(quoted((yield from _read_escape(source))))
        elif (yield from source.accept(end)):
            sink('"')
            return
        else:
            sink(quoted(source.advance(1)))


def _follows(source: Source, char: str) -> Reader[bool]:
    """Whether `char` comes next. False if the text has ended."""
    while source.position == len(source.text):
        if source.is_ended:
            return False
        yield
    return source.text[source.position] == char


def _read_escape(source: Source) -> Reader[str]:
    """The character that an escape stands for. An escape that Python does not know
    stays as it is.
    """
    while len(source.text) - source.position < 2:
        if source.is_ended:
            raise Ended
        yield
    char = source.text[source.position + 1]
    num_digits = _HEX_DIGITS.get(char)
    if num_digits is None:
        source.advance(2)
        return _ESCAPES.get(char, "\\" + char)
    while True:
        match = _HEX.match(source.text, source.position + 2)
        digits = match[0] if match else ""
        if len(digits) >= num_digits:
            break
        if source.position + 2 + len(digits) < len(source.text):
            raise Fault
        if source.is_ended:
            raise Ended
        yield
    code = int(digits[:num_digits], 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise Fault
    source.advance(2 + num_digits)
    return chr(code)


def json_of(text: str) -> str | None:
    """The JSON of a text that is one Python literal; None if it is not."""
    source = Source()
    source.is_open = source.is_ended = True
    source.feed(text.strip() + "\n")  # a scalar ends only where another character follows
    pieces: list[str] = []
    try:
        for _ in read_literal(source, pieces.append):
            raise AssertionError("a whole text never waits")
    except Fault:
        return None
    return "".join(pieces) if source.text[source.position :].strip() == "" else None
