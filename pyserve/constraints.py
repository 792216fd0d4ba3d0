"""Several constraints on one sequence at once: the API and the engine both put some together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyserve.client import Constraint

if TYPE_CHECKING:  # as in client.py
    import numpy as np
    from numpy.typing import NDArray


class AllOf:
    """Implements client.Constraint: what none of its parts forbids."""

    filler = None

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self._parts = parts

    @property
    def is_free(self) -> bool:
        return all(part.is_free for part in self._parts)

    @property
    def is_finished(self) -> bool:
        return any(part.is_finished for part in self._parts)

    @property
    def is_end_void(self) -> bool:
        return any(part.is_end_void for part in self._parts)

    @property
    def error(self) -> str | None:
        return next((part.error for part in self._parts if part.error is not None), None)

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        first, *others = [part for part in self._parts if not part.is_free]
        first.fill_bitmask(words)
        scratch = words.copy() if others else words
        for part in others:
            part.fill_bitmask(scratch)
            words &= scratch

    def accept(self, token_ids: Sequence[int]) -> None:
        for part in self._parts:
            part.accept(token_ids)

    def rollback(self, num_tokens: int) -> None:
        for part in self._parts:
            part.rollback(num_tokens)


def unconstrained() -> None:
    """Makes the constraint of an answer that may have any token."""


def all_of(constraints: Sequence[Constraint | None]) -> Constraint | None:
    """One that is as all of them together; None: every token is allowed."""
    parts = [constraint for constraint in constraints if constraint is not None]
    return AllOf(parts) if len(parts) > 1 else parts[0] if parts else None


def makes_all_of(
    makers: Sequence[Callable[[], Constraint | None]],
) -> Callable[[], Constraint | None]:
    """Makes, for one answer after the other, what all of `makers` make together."""
    return lambda: all_of([make() for make in makers])
