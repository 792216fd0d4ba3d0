"""Combines several constraints on one sequence into one; both the API and the engine do that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyserve.client import Constraint

if TYPE_CHECKING:  # numpy is slow to import, see client.py
    import numpy as np
    from numpy.typing import NDArray


class AllOf:
    """Implements client.Constraint: allows the tokens that all of its parts allow."""

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
    """A maker of constraints that makes none: the answer may have any token."""


def all_of(constraints: Sequence[Constraint | None]) -> Constraint | None:
    """One constraint that combines all that are not None; None where there are none."""
    parts = [constraint for constraint in constraints if constraint is not None]
    return AllOf(parts) if len(parts) > 1 else parts[0] if parts else None


def makes_all_of(
    makers: Sequence[Callable[[], Constraint | None]],
) -> Callable[[], Constraint | None]:
    """A maker that calls all `makers` for each answer, and combines what they return."""
    return lambda: all_of([make() for make in makers])
