"""The text of an answer, read character by character while it comes.

A parser is a generator: where it needs more text than there is, it yields, and goes on when more
has come. It sees characters and never how they were cut into pieces, so that what it finds does not
depend on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

R = TypeVar("R")
Reader = Generator[None, None, R]  # yields where it needs more text
Sink = Callable[[str], None]  # takes what has been read

MAX_HELD_CHARS = 2**16  # read of a call before it is known to be one
WHITE = " \t\r\n"
_WHITE = re.compile(f"[{WHITE}]*")


class Fault(Exception):
    """The text is not a call, or has stopped being one, at the position of the source."""


class Ended(Fault):
    """The text has ended within a call."""


class Source:
    """What has come of a text and has not been delivered.

    position  of the next character to read.
    settled   what stands before it has been delivered, and is forgotten when more comes.
    is_open   a call has begun, so that text is delivered as it is read: nothing is held back.
    """

    __slots__ = ("text", "position", "settled", "is_ended", "is_open")

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.settled = 0
        self.is_ended = False
        self.is_open = False

    def feed(self, text: str) -> None:
        """More of the text."""
        self.text = self.text[self.settled :] + text
        self.position -= self.settled
        self.settled = 0

    def settle(self) -> None:
        """All that was read is delivered."""
        self.settled = self.position

    @property
    def num_held(self) -> int:
        return self.position - self.settled

    def advance(self, count: int) -> str:
        """The next `count` characters, which are there. Raises Fault where too many are held."""
        start = self.position
        self.position += count
        if not self.is_open and self.num_held > MAX_HELD_CHARS:
            raise Fault
        return self.text[start : self.position]

    def peek(self) -> Reader[str]:
        """The next character. Raises Ended."""
        while self.position == len(self.text):
            if self.is_ended:
                raise Ended
            yield
        return self.text[self.position]

    def skip_white(self) -> Reader[str]:
        """White space, and then a character that is not. Raises Ended."""
        white = ""
        while True:
            match = _WHITE.match(self.text, self.position)
            assert match is not None
            white += self.advance(len(match[0]))
            if self.position < len(self.text):
                return white
            yield from self.peek()

    def expect(self, literal: str) -> Reader[None]:
        """Read `literal`. Raises Fault where something else stands there."""
        if not (yield from self.accept(literal)):
            raise Fault

    def accept(self, literal: str) -> Reader[bool]:
        """Whether `literal` comes next; it has been read then. Raises Ended within it."""
        while not self.text.startswith(literal, self.position):
            rest = self.text[self.position : self.position + len(literal)]
            if len(rest) == len(literal) or not literal.startswith(rest):
                return False
            if self.is_ended:
                raise Ended
            yield
        self.advance(len(literal))
        return True

    def run(self, pattern: re.Pattern[str], max_chars: int) -> Reader[str]:
        """As many characters as `pattern`, a repeated class, matches, up to one that it does not.

        Raises Fault where there are more than `max_chars`, and Ended, both in front of them.
        """
        while True:
            match = pattern.match(self.text, self.position)
            length = 0 if match is None else len(match[0])
            if length > max_chars:
                raise Fault
            if self.position + length < len(self.text):
                return self.advance(length)
            if self.is_ended:
                raise Ended
            yield
