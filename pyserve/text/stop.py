"""Stop strings in a stream of text.

The match that ends first wins, as if the text came character by character. Of several that end at
the same place, the one that starts first wins. So the result does not depend on how the text was
cut. Only the longest end of the text that is the beginning of a stop string is held back. An
Aho-Corasick automaton (1975) takes time linear in the length of the text, whatever the strings are.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopChecker:
    """Cuts one stream of text at the first stop string."""

    __slots__ = ("_automaton", "_include", "_state", "_held", "_matched")

    def __init__(self, stop: Sequence[str], is_stop_kept: bool) -> None:
        """A checker for these stop strings, none of them empty. One character of them takes about
        300 bytes of memory.

        is_stop_kept  whether the text includes the stop string that ends it.
        """
        assert all(stop), "an empty stop string"
        self._automaton = _automaton(tuple(stop))
        self._include = is_stop_kept
        self._state = 0
        self._held = ""
        self._matched = False

    def copy(self) -> StopChecker:
        """A checker for another text that has the same beginning."""
        return copy.copy(self)

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be delivered, and the stop string that ends it; None if the text goes
        on.

        Must not be called again after a stop string.
        """
        assert not self._matched, "text after a stop string"
        automaton = self._automaton
        state, end, found = automaton.run(self._state, text)
        if found is not None:
            self._matched = True
            settled = self._held + text[:end]
            self._held = ""
            return (settled if self._include else settled[: -len(found)]), found
        self._state = state
        if state == 0 and not self._held:
            return text, None
        whole = self._held + text
        num_settled = len(whole) - automaton.depth[state]
        self._held = whole[num_settled:]
        return whole[:num_settled], None

    def flush(self) -> str:
        """The text that was held back, when the stream has ended without a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """State 0 is the root. Each state stands for a beginning of a stop string.

    next   character -> next state.
    depth  length of that beginning.
    found  the longest stop string that the beginning ends with; None if there is none.
    fail   the state of its longest proper suffix that is a state.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.found: list[str | None] = [None]
        for string in stop:
            state = 0
            for char in string:
                if char not in self.next[state]:
                    self.next[state][char] = len(self.next)
                    self.next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.found.append(None)
                state = self.next[state][char]
            self.found[state] = string
        self.fail = [0] * len(self.next)
        self._link()
        first = "".join(map(re.escape, self.next[0]))
        self._first = re.compile(f"[{first}]" if first else "(?!)").search

    def run(self, state: int, text: str) -> tuple[int, int, str | None]:
        """Follow `text`. Returns (state, 0, None), or at a stop string (0, position after it,
        string).
        """
        position = 0
        while position < len(text):
            if state == 0:  # skip to the next character that begins a stop string
                match = self._first(text, position)
                if match is None:
                    return 0, 0, None
                position = match.start()
            state = self._step(state, text[position])
            position += 1
            found = self.found[state]
            if found is not None:
                return 0, position, found
        return state, 0, None

    def _step(self, state: int, char: str) -> int:
        while state and char not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(char, 0)

    def _link(self) -> None:
        """Fill `fail` breadth first, so that the shorter states which it points to are ready."""
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            if self.found[state] is None:
                self.found[state] = self.found[self.fail[state]]
            for char, child in self.next[state].items():
                self.fail[child] = self._step(self.fail[state], char)
                queue.append(child)


@lru_cache(maxsize=1)
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    """The automaton, cached so that all choices of one request share it."""
    return _Automaton(stop)
