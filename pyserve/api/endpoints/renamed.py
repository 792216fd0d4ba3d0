"""Field names of a ChatRequest -> the names that the client of another API used.

Every conversation is checked as a ChatRequest, so errors and headers name the fields of that type.
Each other API lists once, as rules, what those fields are called in its own requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pyserve.errors import RequestError

# A regular expression that matches a name, and its replacement, as for re.sub.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


class Renamed:
    """Renames fields by the rules of one request; of the rules that match, the first one counts."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(re.compile(pattern), name) for pattern, name in rules]
        self._any = re.compile("|".join(f"(?:{pattern})" for pattern, _ in rules))

    def __call__(self, text: str) -> str:
        """`text` with all field names in it replaced by those that the client used."""
        return self._any.sub(lambda found: self._rename(found[0]), text)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Rename the fields in the message and param of a RequestError raised in the context."""
        try:
            yield
        except RequestError as error:
            # What follows ", got " is the client's own value and must not be changed.
            said, got, value = error.message.partition(", got ")
            error.message = f"{self(said)}{got}{value}"
            error.param = error.param and self(error.param)
            raise

    def _rename(self, name: str) -> str:
        for pattern, renamed in self._rules:
            found = pattern.fullmatch(name)
            if found:
                return found.expand(renamed) if isinstance(renamed, str) else renamed(found)
        return name
