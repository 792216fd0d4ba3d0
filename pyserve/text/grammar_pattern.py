"""Regular expressions of requests -> those of the grammar engine, in the syntax of Rust's regex
crate.

Schemas and clients write patterns in the syntax of ECMAScript or Python. What Rust reads
differently is rewritten or refused: brackets inside a class, Unicode classes, lookarounds. A
pattern that would blow up is refused by its size with all repeats written out.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

MAX_PATTERN_CHARS = 20_000
MAX_PATTERN_SIZE = 20_000  # characters and classes, with repeats written out
MAX_GROUPS_DEPTH = 100
MAX_EXCLUDED_CHARS = 90

_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_BRACED = re.compile(r"\\[uxpP]\{\w+\}")
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_"}
# Set operations in Rust, plain characters elsewhere.
_IN_CLASS = {"[": r"\[", "&": r"\&", "~": r"\~"}
_GROUP = re.compile(r"\?(?::|P?<[A-Za-z_]\w*>|[a-zA-Z]+(?:-[a-zA-Z]+)?[:)])")
_LOOKAHEAD = "(?="
# Patterns with lookaheads that older versions of pydantic and Zod write -> equal patterns without.
# The lookaheads rule out a lone sign or point, and two points in a row.
_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$"
)
SAME = {
    _DECIMAL: r"^[+-]?(?:\d+\.?\d*|\.\d+)$",
    _EMAIL: r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@"
    r"(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
}


class PatternError(ValueError):
    """What is wrong with a pattern. The message does not say where in the request the
    pattern is.
    """


class PatternSizeError(PatternError):
    """The pattern is too large: it would blow up in the engine."""


def engine_pattern(pattern: str) -> str:
    """The same pattern in the engine's syntax. Raises PatternError."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternSizeError(
            f"the pattern has {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}"
        )
    return _Reader(pattern).read()


def without_lookaheads(pattern: str) -> list[str]:
    """Patterns that a string must all match, in place of one that begins with lookaheads.

    `^(?=A)(?=B)C` matches a string if `^C`, `^(?:A)` and `^(?:B)` match it. A pattern that cannot
    be split in this way is returned alone, as it is.
    """
    pattern = SAME.get(pattern, pattern)
    if not pattern.startswith("^" + _LOOKAHEAD):
        return [pattern]
    parts, rest = [], pattern[1:]
    while rest.startswith(_LOOKAHEAD):
        end = _group_end(rest)
        parts.append(f"^(?:{rest[len(_LOOKAHEAD) : end - 1]})")
        rest = rest[end:]
        if not end or rest[:1] in ("*", "+", "?", "{"):
            return [pattern]
    # The lookaheads belong only to the first of several branches.
    return [pattern] if _has_branches(rest) else [f"^{rest}", *parts]


def all_but(texts: AbstractSet[str]) -> str:
    """A pattern of all strings except these. Raises PatternSizeError if one of them is too long."""
    longest = max(map(len, texts), default=0)
    if longest > MAX_EXCLUDED_CHARS:
        raise PatternSizeError(
            f"a value that is ruled out has {longest} characters, the limit is {MAX_EXCLUDED_CHARS}"
        )
    return f"^{_all_but(texts)}$"


def _all_but(texts: AbstractSet[str]) -> str:
    firsts = sorted({text[0] for text in texts if text})
    branches = [] if "" in texts else [""]
    excluded = "".join(map(_literal, firsts))
    branches.append(rf"[^{excluded}][\s\S]*" if firsts else r"[\s\S]+")
    for first in firsts:
        rest = _all_but({text[1:] for text in texts if text[:1] == first})
        branches.append(_literal(first) + rest)
    return f"(?:{'|'.join(branches)})"


def _literal(char: str) -> str:
    """A character, escaped so that it stands for itself inside and outside a class."""
    return "\\" + char if char in string.punctuation and char not in "<>" else char


def _group_end(text: str) -> int:
    """The position after the group that `text` begins with; 0 if that group is not closed."""
    depth = 0
    for at, char in _syntax(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return at + 1
    return 0


def _has_branches(text: str) -> bool:
    depth = 0
    for _, char in _syntax(text):
        depth += (char == "(") - (char == ")")
        if char == "|" and depth == 0:
            return True
    return False


def _syntax(text: str) -> Iterator[tuple[int, str]]:
    """The positions and characters that are neither escaped nor in a class."""
    at, is_in_class = 0, False
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif is_in_class:
            is_in_class = char != "]"
        elif char == "[":
            is_in_class = True
        else:
            yield at, char
        at += 1


class _Reader:
    """Reads a pattern in one pass. Its size is the number of atoms, each counted once
    per repeat.
    """

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._out: list[str] = []
        self._sizes = [0]  # size of each open group, outermost first
        self._last = 0  # size of the last atom, which its group's size includes already

    def read(self) -> str:
        while self._at < len(self._text):
            self._step(self._text[self._at])
            if self._sizes[-1] > MAX_PATTERN_SIZE:
                raise PatternSizeError(
                    "the pattern's repeats, written out, have more than "
                    f"{MAX_PATTERN_SIZE} characters"
                )
        if len(self._sizes) > 1:
            raise PatternError("a group of the pattern is not closed")
        return "".join(self._out)

    def _step(self, char: str) -> None:
        if char == "\\":
            self._escape(is_in_class=False)
            self._atom(1)
        elif char == "[":
            self._class()
            self._atom(1)
        elif char == "(":
            self._open()
        elif char == ")":
            if len(self._sizes) == 1:
                raise PatternError("the pattern closes a group that is not open")
            self._take(1)
            self._atom(self._sizes.pop())
        elif char == "{" and (match := _COUNT.match(self._text, self._at)):
            self._repeat(match)
        elif self._text.startswith("{,", self._at):
            raise PatternError(
                "the pattern has {,N}, which languages read in two ways: write {0,N}"
            )
        else:
            if char in "{}":  # a lone brace stands for itself in ECMAScript
                self._out.append("\\")
            self._take(1)
            self._atom(char not in "*+?|^$")

    def _take(self, count: int) -> None:
        self._out.append(self._text[self._at : self._at + count])
        self._at += count

    def _atom(self, size: int) -> None:
        if size:
            self._last = size
            self._sizes[-1] += size

    def _open(self) -> None:
        self._take(1)
        if self._text.startswith("?", self._at):
            match = _GROUP.match(self._text, self._at)
            if match is None:
                shown = self._text[self._at - 1 : self._at + 3]
                raise PatternError(
                    f"the pattern's group {shown} cannot be enforced (no lookaround, conditions "
                    "or references)"
                )
            self._take(len(match[0]))
            if match[0].endswith(")"):  # a group of flags only, such as (?i)
                return
        if len(self._sizes) > MAX_GROUPS_DEPTH:
            raise PatternSizeError(
                f"the pattern's groups are nested deeper than {MAX_GROUPS_DEPTH}"
            )
        self._sizes.append(0)

    def _repeat(self, match: re.Match[str]) -> None:
        digits = [number for number in match.groups() if number]
        if any(len(number) > 6 for number in digits):
            raise PatternSizeError(f"the pattern repeats {match[0][:40]} times, which is too often")
        times = max(map(int, digits))
        self._sizes[-1] += self._last * max(times - 1, 0)
        self._last *= max(times, 1)
        self._take(len(match[0]))

    def _escape(self, *, is_in_class: bool) -> None:
        char = self._text[self._at + 1 : self._at + 2]
        if match := _BRACED.match(self._text, self._at):
            self._take(len(match[0]))
            return
        if not char:
            raise PatternError("the pattern ends with a backslash")
        if char in "bB" and not is_in_class:
            raise PatternError(f"the pattern's word boundary \\{char} cannot be enforced")
        if char in "123456789k" and not is_in_class:
            raise PatternError(f"the pattern's reference \\{char} cannot be enforced")
        if char in _CLASSES:  # ASCII only, as in ECMAScript
            self._out.append(_CLASSES[char] if is_in_class else f"[{_CLASSES[char]}]")
        elif char.lower() in _CLASSES and not is_in_class:
            self._out.append(f"[^{_CLASSES[char.lower()]}]")
        elif char in "bBDW" and is_in_class:
            raise PatternError(f"the pattern's \\{char} inside brackets cannot be enforced")
        elif char == "0":
            self._out.append(r"\x00")
        elif ord(char) > 127:
            self._out.append(char)
        else:
            self._out.append("\\" + char)
        self._at += 2

    def _class(self) -> None:
        start = self._at
        self._take(2 if self._text.startswith("[^", start) else 1)
        if self._text.startswith("]", self._at):
            raise PatternError(
                r"the pattern's class begins with ], which languages read in two ways: write \]"
            )
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "]":
                self._take(1)
                return
            if char == "\\":
                self._escape(is_in_class=True)
            elif self._text.startswith("--", self._at):
                raise PatternError(r"the pattern has -- inside brackets: write \-")
            elif char in _IN_CLASS:
                self._out.append(_IN_CLASS[char])
                self._at += 1
            else:
                self._take(1)
        raise PatternError("a class of the pattern, [..., is not closed")
