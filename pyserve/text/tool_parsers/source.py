"""The text of an answer, read character by character while it arrives.

A parser is a generator: it yields when it needs more text than has arrived, and is resumed when
there is more. It never sees how the text was cut into pieces, so its result does not depend on
that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

R = TypeVar("R")
Reader = Generator[None, None, R]  # yields when it needs more text
Sink = Callable[[str], None]  # receives the text that has been read

MAX_HELD_CHARS = 2**16  # characters read of a possible call before it is known to be one
WHITE = " \t\r\n"
_WHITE = re.compile(f"[{WHITE}]*")


class Fault(Exception):
    """The text is not a call, or has stopped being one, at the current position."""


class Ended(Fault):
    """The text ends within a call."""


class Source:
    """The text of an answer that has arrived and has not been delivered.

    position  index of the next character to read.
    settled   index up to which the text has been delivered; it is forgotten when more arrives.
    is_open   a call has begun, so text is delivered as it is read instead of being held back.
    """

    __slots__ = ("text", "position", "settled", "is_ended", "is_open")

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.settled = 0
        self.is_ended = False
        self.is_open = False

    def feed(self, text: str) -> None:
        """Append text that has arrived."""
        self.text = self.text[self.settled :] + text
        self.position -= self.settled
        self.settled = 0

    def settle(self) -> None:
        """Mark all text that was read as delivered."""
        self.settled = self.position

    @property
    def num_held(self) -> int:
        return self.position - self.settled

    def advance(self, count: int) -> str:
        """Read the next `count` characters, which must have arrived. Raises Fault if too many are
        held.
        """
        start = self.position
        self.position += count
        if not self.is_open and self.num_held > MAX_HELD_CHARS:
            raise Fault
        return self.text[start : self.position]

    def peek(self) -> Reader[str]:
        """The next character, without reading it. Raises Ended."""
        while self.position == len(self.text):
            if self.is_ended:
                raise Ended
            yield
        return self.text[self.position]

    def skip_white(self) -> Reader[str]:
        """Read white space, up to a character that is none. Raises Ended."""
        white = ""
        while True:
            match = _WHITE.match(self.text, self.position)
            assert match is not None
            white += self.advance(len(match[0]))
            if self.position < len(self.text):
                return white
            yield from self.peek()

    def expect(self, literal: str) -> Reader[None]:
        """Read `literal`. Raises Fault if something else comes, and Ended if the text ends within
        it.
        """
        if not (yield from self.accept(literal)):
            raise Fault

    def accept(self, literal: str) -> Reader[bool]:
        """Read `literal` if it comes next, and return whether it did. Raises Ended within it."""
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
        """Read all characters that `pattern`, a repeated character class, matches.

        Nothing is read if it raises: Fault if there are more than `max_chars`, Ended if the text
        ends before a character that does not match.
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
