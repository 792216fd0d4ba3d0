"""Where one answer is in a grammar.

All answers to a grammar share the states of its lexer, which makes the first of them pay and the
others not. The states of some grammars have no end that is in reach, and the engine bounds their
number: then all that share them stand still. So an answer that stands still goes on, once, with
states of its own, and only what is too complex by itself ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

from llguidance import LLMatcher

from pyserve.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_MASK_S = 0.1  # of work: tens of times what those of large schemas take at first
MAX_ALONE = 64  # answers with states of their own, of up to 15 MB each
MAX_ERROR_CHARS = 300
TOO_SLOW = (
    "the grammar is too complex: to find the tokens that may come next has taken more than "
    f"{1e3 * MAX_MASK_S:.0f} ms"
)

_OF_SHARED = ("lexer error", "panic", "Poison")  # what may be wrong with the states that are shared

_alone: WeakSet[Matcher] = WeakSet()
_lock = threading.Lock()


class Shared:
    """What all answers to a grammar begin with.

    matcher      at the beginning of the grammar; None once it is of no use: its states may take
                 hundreds of megabytes, and the next answer would fail with them too.
    is_too_slow  a mask has taken too long. No further one is asked for, whichever answer it would
                 be of, as all sequences of a step wait for it.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher: LLMatcher | None = matcher
        self.is_too_slow = False

    def drop(self, *, is_too_slow: bool = False) -> None:
        self.matcher = None
        self.is_too_slow |= is_too_slow


class Matcher:
    """Never used by two threads at once; `error` is told by the calls that find it.

    renew  makes a matcher at the beginning of the same grammar that shares nothing; None where
           that takes too long. Raises RequestError.
    """

    def __init__(
        self, inner: LLMatcher, renew: Callable[[], LLMatcher | None], shared: Shared
    ) -> None:
        self._inner = inner
        self._shared = shared
        self._renew: Callable[[], LLMatcher | None] | None = renew
        self._given: list[int] = []
        self._is_broken = False  # what it shared is; it goes on alone when a mask is asked for

    @property
    def is_stopped(self) -> bool:
        """Nothing but the end may follow."""
        return not self._is_broken and self._inner.is_stopped() and not self._inner.is_error()

    def fill_bitmask(self, words: NDArray[np.int32]) -> str:
        """As client.Constraint has it; why it cannot, "" where it can."""
        if self._shared.is_too_slow:
            return TOO_SLOW
        began_s = time.thread_time()  # of work: that the machine is busy is not the grammar's doing
        error = self._fill(words, began_s)
        if time.thread_time() - began_s > MAX_MASK_S:
            self._shared.drop(is_too_slow=True)
            return TOO_SLOW
        return error

    def _fill(self, words: NDArray[np.int32], began_s: float) -> str:
        address = words.__array_interface__["data"][0]
        if not self._is_broken:
            self._inner.unsafe_compute_mask_ptr(address, words.nbytes)
        if self._is_broken or self._inner.is_error():
            # What has taken long to fail would take as long again.
            is_quick = time.thread_time() - began_s < MAX_MASK_S / 10
            if not (is_quick and self._go_on_alone()):
                self._shared.drop()
                return shortened(self._inner.get_error())
            self._inner.unsafe_compute_mask_ptr(address, words.nbytes)
        return shortened(self._inner.get_error())

    def allows(self, token_id: int) -> bool:
        return self._is_broken or bool(self._inner.validate_tokens([token_id]))

    def consume(self, token_ids: list[int]) -> str:
        """Go on by these tokens; why it cannot, "" where it can."""
        self._given += token_ids
        if self._is_broken or self._inner.consume_tokens(token_ids):
            return ""
        error = self._inner.get_error()
        if self._renew is not None and any(word in error for word in _OF_SHARED):
            self._is_broken = True
            return ""
        return shortened(error)

    def rollback(self, num_tokens: int) -> str:
        """Go back by so many tokens; why it cannot, "" where it can."""
        del self._given[len(self._given) - num_tokens :]
        if self._is_broken or self._inner.rollback(num_tokens):
            return ""
        return shortened(self._inner.get_error())

    def reset(self) -> None:
        """Go back to the beginning."""
        self._given.clear()
        self._inner.reset()

    def _go_on_alone(self) -> bool:
        renew, self._renew = self._renew, None
        with _lock:
            if renew is None or len(_alone) >= MAX_ALONE:
                return False
            _alone.add(self)
        try:
            matcher = renew()
        except RequestError:
            matcher = None
        if matcher is None:
            return False
        self._inner = matcher
        self._is_broken = False
        matcher.consume_tokens(self._given)
        return True


def shortened(error: str) -> str:
    """What the engine says in a line, without its own notes and a trace through itself."""
    lines = [line.strip() for line in error.partition("<backtrace>")[0].splitlines()]
    lines = [line for line in lines if not line.startswith(("<", "while processing"))]
    return " ".join(filter(None, lines))[:MAX_ERROR_CHARS]
