"""Keeps special tokens that a user spelled out from being parsed as control tokens of a chat.

A template mixes its own markup with users' text into one string, and the tokenizer cannot tell them
apart. So before rendering, a mark is put wherever a special token begins in a user's string: a
Unicode noncharacter that the request does not contain. After rendering, the marks are removed, and
their positions are where the tokenizer must cut the text. A user's string that ends with the
beginning of a special token is also cut at its end, so that the text after it cannot complete the
token.

Texts are searched in pieces, because a search holds the interpreter's lock: one long search would
block the event loop, on whatever thread it runs.

Not covered: special tokens of one character, and template markup closed around a whole user string
('<|' + role + '|>'), which is how such templates are meant to work; the API checks roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pyserve.errors import InvalidRequestError

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
PIECE_CHARS = 2**18  # searched in a few milliseconds


class ChatPrompt(str):
    """A rendered prompt.

    breaks  ascending positions at which the text must be cut to encode it.
    merged  what was done to the order of the messages, as turn_order.in_order returns it.
    """

    __slots__ = ("breaks", "merged")
    breaks: tuple[int, ...]
    merged: str

    def __new__(cls, text: str, breaks: tuple[int, ...] = ()) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.breaks = breaks
        prompt.merged = ""
        return prompt


class ControlGuard:
    """Marks control tokens in users' strings, and turns the marks in a rendered text
    into breaks.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = [token for token in control_tokens if len(token) > 1]
        pattern = _trie_pattern(tokens)
        self._find_start = re.compile(f"(?={pattern})").finditer
        self._search = re.compile(pattern).search  # faster than _find_start if the text has none
        self._match = re.compile(pattern).match
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)
        first = "".join(sorted({re.escape(token[0]) for token in tokens}))
        self._search_first = re.compile(f"[{first}]" if first else "(?!)").search

    def concerns(self, value: Any) -> bool:
        """Whether any string in JSON-like data needs a mark."""
        return any(self._holds(text) or self._is_unfinished(text) for text in strings_in(value))

    def mark(self, value: Any, marks: str) -> Any:
        """A copy of JSON-like data with marks[0] before each control token, and marks[1] after each
        string that ends with the beginning of one.
        """
        if isinstance(value, str):
            return self._mark_text(value, marks)
        if isinstance(value, dict):
            return {self.mark(key, marks): self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, marks) for item in value]
        return value

    def settle(self, text: str, marks: str) -> ChatPrompt:
        """Remove the marks from a rendered text. The result's breaks are where they were, or one
        character further, so that they lie within the token.
        """
        found = [match.start() for match in re.finditer(f"[{marks}]", text)]
        cuts = [0, *[at + 1 for at in found], len(text) + 1]
        plain = "".join([text[a : b - 1] for a, b in zip(cuts, cuts[1:], strict=False)])
        breaks = set()
        for num_before, at in enumerate(found):
            position = at - num_before
            is_token = text[at] == marks[0] and self._match(plain, position)
            breaks.add(position + 1 if is_token else position)  # cut within the token
        return ChatPrompt(plain, tuple(sorted(breaks - {0, len(plain)})))

    def _holds(self, text: str) -> bool:
        """Whether the text contains a control token."""
        return any(
            self._search(text, start, start + PIECE_CHARS + self._longest)
            for start in range(0, len(text), PIECE_CHARS)
        )

    def _starts(self, text: str) -> Iterator[int]:
        """The positions at which control tokens begin."""
        for start in range(0, len(text), PIECE_CHARS):
            for match in self._find_start(text, start, start + PIECE_CHARS + self._longest):
                if match.start() >= start + PIECE_CHARS:
                    break  # the next piece finds it
                yield match.start()

    def _mark_text(self, text: str, marks: str) -> str:
        starts = list(self._starts(text))
        cuts = [0, *starts, len(text)]
        end = marks[1] if self._is_unfinished(text) else ""
        return marks[0].join(text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)) + end

    def _is_unfinished(self, text: str) -> bool:
        """Whether the text ends with the beginning of a control token."""
        match = self._search_first(text, max(0, len(text) - self._longest + 1))
        if match is None:
            return False
        return any(text[start:] in self._beginnings for start in range(match.start(), len(text)))


def strings_in(value: Any) -> Iterator[str]:
    """All strings in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def unused_noncharacters(count: int, value: Any, *, source: str) -> str:
    """`count` noncharacters that occur neither in the data nor in the template's source. Raises
    InvalidRequestError if there are not enough.
    """
    texts = [source, *strings_in(value)]
    free = ""
    for char in _NONCHARACTERS:
        if not any(char in text for text in texts):
            free += char
            if len(free) == count:
                return free
    raise InvalidRequestError(
        "messages hold too many of the noncharacters U+FDD0 to U+FDEF", "messages"
    )


def _trie_pattern(tokens: Iterable[str]) -> str:
    """A pattern that finds any of the tokens; of two tokens where one begins with the other, the
    shorter.

    The pattern is nested by common beginnings. A plain alternation of a thousand reserved tokens
    would try each of them at every "<".
    """
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[0], []).append(token)
    branches = []
    for group in groups.values():
        shared = _shared_beginning(group)
        rest = [token[len(shared) :] for token in group]
        branches.append(re.escape(shared) + ("" if "" in rest else _trie_pattern(rest)))
    return f"(?:{'|'.join(sorted(branches))})" if branches else "(?!)"


def _shared_beginning(tokens: list[str]) -> str:
    first, last = min(tokens), max(tokens)
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]
