"""Nested values, read while they arrive: what JSON and Python literals have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pyserve.text.tool_parsers.source import Fault, Reader, Sink, Source

MAX_DEPTH = 64  # nesting of lists and objects
MAX_SCALAR_CHARS = 512  # length of a number or word
_CLOSER = {"{": "}", "[": "]"}


class ValueReader(ABC):
    """Reads values one after the other, and writes them to `sink` as JSON.

    quotes  characters that begin a string.
    """

    quotes = '"'

    def __init__(self, source: Source, sink: Sink) -> None:
        self.source = source
        self.sink = sink

    def read(self) -> Reader[None]:
        """Read one value from its first character on. Raises Fault if there is none."""
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
        """Read what follows a value, up to the next value. False if the outermost value
        has ended.
        """
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
        """Read white space."""

    @abstractmethod
    def comma(self, closer: str) -> Reader[bool]:
        """Read up to the next value or key. False if `closer` comes next, unread. Raises Fault."""

    @abstractmethod
    def key(self) -> Reader[None]:
        """Read a key, its colon and the white space after it."""

    @abstractmethod
    def string(self) -> Reader[None]:
        """Read a string with its quotes."""

    @abstractmethod
    def scalar(self) -> Reader[None]:
        """Read a number or a word."""
