"""Names of fields of a ChatRequest, as the wire of another dialect has them.

A conversation is checked as a ChatRequest, whose fields errors and headers then name. A dialect
says once what they are called where its client wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pyserve.errors import RequestError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]  # a regular expression, what stands for it


class Renamed:
    """The names of one request: rules in order, of which the first that fits a place counts."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(re.compile(pattern), name) for pattern, name in rules]
        self._any = re.compile("|".join(f"(?:{pattern})" for pattern, _ in rules))

    def __call__(self, text: str) -> str:
        """`text` with all names in it as the client knows them."""
        return self._any.sub(lambda found: self._rename(found[0]), text)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What is raised within names the client's fields."""
        try:
            yield
        except RequestError as error:
            # What was got is the client's own text.
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
