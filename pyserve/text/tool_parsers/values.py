"""Values within values, read as they come: what JSON and Python's literals have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pyserve.text.tool_parsers.source import Fault, Reader, Sink, Source

MAX_DEPTH = 64  # of lists and objects
MAX_SCALAR_CHARS = 512  # of a number
_CLOSER = {"{": "}", "[": "]"}


class ValueReader(ABC):
    """Reads one value after the other; JSON goes to `sink`.

    quotes  characters that a string begins with.
    """

    quotes = '"'

    def __init__(self, source: Source, sink: Sink) -> None:
        self.source = source
        self.sink = sink

    def read(self) -> Reader[None]:
        """A value, from its first character on. Raises Fault at what is none."""
        source, closers = self.source, list[str]()
        while True:
            first = yield from source.peek()
            if first in _CLOSER:
                self.sink(source.advance(1))
                closers.append(_CLOSER[first])
                if len(closers) > MAX_DEPTH:
                    raise Fault
                yield from self.white()
                if (yield from source.peek()) != closers[-1]:
                    if first == "{":
                        yield from self.key()
                    continue
            elif first in self.quotes:
                yield from self.string()
            else:
                yield from self.scalar()
            if not (yield from self._go_on(closers)):
                return

    def _go_on(self, closers: list[str]) -> Reader[bool]:
        """What follows a value, up to the next one; False: the outermost value has ended."""
        while closers:
            yield from self.white()
            if (yield from self.comma(closers[-1])):
                if closers[-1] == "}":
                    yield from self.key()
                return True
            self.sink(self.source.advance(1))
            closers.pop()
        return False

    @abstractmethod
    def white(self) -> Reader[None]:
        """White space."""

    @abstractmethod
    def comma(self, closer: str) -> Reader[bool]:
        """Up to the next value or key; False: up to `closer`, which is next. Raises Fault."""

    @abstractmethod
    def key(self) -> Reader[None]:
        """A key, its colon and the white space behind it."""

    @abstractmethod
    def string(self) -> Reader[None]:
        """A string, its quotes included."""

    @abstractmethod
    def scalar(self) -> Reader[None]:
        """A number or a word."""
