"""Where one answer is in a grammar.

All answers to a grammar share the states of its lexer, which makes the first of them pay and the
others not. The states of some grammars have no end that is in reach, and the engine bounds their
number: then all that share them stand still. So an answer that stands still goes on, once, with
states of its own, and only what is too complex by itself ends.

What grammars take together, with their states, is bounded here (MAX_ALL_BYTES). The engine does not
tell bytes, but what the states have cost it to make, in units of its own: it stands in its errors.

It holds a lock over the states while it fills a mask with them: masks of one grammar are filled one
after the other, on however many threads. So a grammar whose masks take long is there several times
(grammar.Compiled), and answers that share nothing are filled side by side.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from llguidance import LLExecutor, LLMatcher

from pyserve.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_MASK_S = 0.1  # of work: tens of times what those of large schemas take at first
MAX_TOKEN_S = 0.005  # of a mask and of the token behind it, whose states are there
MAX_CONSUME_S = 0.02  # of one token, for which the event loop waits
MAX_CALL_S = 0.01  # of a call that fills masks of several answers, at the pace of the last ones
QUICK_S = 0.004  # as AsyncEngine waits
MIN_CALL_ROWS = 8  # fewer take longer to hand over than to fill
LONG_CALL_S = 0.025
WATCHED_EVERY = 8  # calls that took too long, of which the batch behind one is watched
MAX_ALL_BYTES = 2**28  # of the grammars that are in use or kept
BYTES_PER_COST = 32  # of states: 3 to 30 for those that take much, up to 60 of few
MASKS_OF_MEAN = 64  # the last ones, whose time counts; in place of that of the trial
MAX_UNMEASURED_S = 0.005  # of work, which makes 3 MB of states at most
NO_TOKEN = 2**31  # an id that no model has
MAX_ERROR_CHARS = 300
TOO_SLOW = (
    "the grammar is too complex: to find the tokens that may come next takes longer than the limit "
    f"of {1e3 * MAX_MASK_S:.0f} ms for one, {1e3 * MAX_TOKEN_S:.0f} ms for each of many"
)
FULL = (
    "the grammars in use have more states than their memory of "
    f"{MAX_ALL_BYTES // 2**20} MB holds, and this one adds to them"
)

_OF_SHARED = ("lexer error", "panic", "Poison")  # what may be wrong with the states that are shared


_all: WeakSet[Shared] = WeakSet()
_lock = threading.Lock()


class Shared:
    """What the answers to a grammar begin with, all of them or those to one of its copies.

    matcher        at the beginning of the grammar; None once it is of no use: its states may take
                   hundreds of megabytes, and the next answer would fail with them too.
    num_bytes      that it took when it was compiled, and then what it takes with the states that
                   answers have added, estimated when that was measured.
    unmeasured_s   work since.
    is_too_slow    a mask has taken too long. No further one is asked for, whichever answer it would
                   be of, as all sequences of a step wait for it; the same for all copies.
    answers        that go on with these states.
    mask_s         seconds of work that one of the last masks has taken on average, above 0.
    """

    def __init__(
        self, matcher: LLMatcher, num_bytes: int, *, mask_s: float, copy_of: Shared | None = None
    ) -> None:
        self.matcher: LLMatcher | None = matcher
        self.num_bytes = num_bytes
        self.unmeasured_s = 0.0
        self.answers: WeakSet[Matcher] = WeakSet()
        self._copy_of = copy_of  # None: of nothing; itself, it would live until it is collected
        self._is_too_slow = False
        self.mask_s, self._num_masks = max(mask_s, 1e-6), 0
        self._cost = state_cost(matcher)
        self._measuring_s = 0.0  # that it took the last time
        with _lock:
            _all.add(self)

    @property
    def is_too_slow(self) -> bool:
        return (self._copy_of or self)._is_too_slow

    def note_mask(self, worked_s: float) -> None:
        """A mask has taken so long."""
        self.unmeasured_s += worked_s
        self._num_masks = min(self._num_masks + 1, MASKS_OF_MEAN)
        self.mask_s += (worked_s - self.mask_s) / self._num_masks

    @property
    def is_measure_due(self) -> bool:
        """To measure takes a tenth of the work at most."""
        return self.unmeasured_s > max(MAX_UNMEASURED_S, 10 * self._measuring_s)

    def measure(self) -> None:
        """Takes a fraction of a millisecond where answers have gone on since the last time."""
        matcher = self.matcher
        if matcher is None or not self.unmeasured_s:
            return
        self.unmeasured_s, began_s = 0.0, time.perf_counter()
        cost = state_cost(matcher)
        self._measuring_s = time.perf_counter() - began_s
        self.num_bytes += BYTES_PER_COST * max(cost - self._cost, 0)
        self._cost = max(cost, self._cost)

    def drop(self, *, is_too_slow: bool = False) -> None:
        self.matcher = None
        (self._copy_of or self)._is_too_slow |= is_too_slow


def is_memory_full() -> bool:
    """Whether all grammars that are in use or kept take more together than they may."""
    with _lock:
        return sum([one.num_bytes for one in _all]) > MAX_ALL_BYTES


def measure_all() -> None:
    """Shared.measure of each that there is."""
    with _lock:
        each = list(_all)
    for one in each:
        one.measure()


def state_cost(matcher: LLMatcher) -> int:
    """What the states that `matcher` shares have cost to make, in the engine's units: a hundred or
    so for each. An error tells it, which a copy of the matcher is given. 0 where it does not.
    """
    copy = matcher.deep_copy()
    copy.compute_bitmask()
    copy.consume_token(NO_TOKEN)
    found = _COST.search(copy.get_error())
    return int(found[1]) if found else 0


_COST = re.compile(r'"lexer_cost": (\d+)')


class Matcher:
    """Never used by two threads at once; `error` is told by the calls that find it.

    renew  makes a matcher at the beginning of the same grammar that shares nothing; None where
           that takes too long. Raises RequestError.
    """

    def __init__(self, renew: Callable[[], Shared | None], shared: Shared) -> None:
        assert shared.matcher is not None
        self._inner: LLMatcher = shared.matcher.deep_copy()
        self._shared = shared  # with the answers to the same grammar
        self._own: Shared | None = None  # with none
        self._renew: Callable[[], Shared | None] | None = renew
        self._given: list[int] = []
        self._worked_s = 0.0
        self._is_broken = False  # what it shared is; it goes on alone when a mask is asked for
        shared.answers.add(self)

    @property
    def is_stopped(self) -> bool:
        """Nothing but the end may follow."""
        return not self._is_broken and self._inner.is_stopped() and not self._inner.is_error()

    def fill_bitmask(self, words: NDArray[np.int32]) -> str:
        """As client.Constraint has it; why it cannot, "" where it can."""
        if self._shared.is_too_slow:
            return TOO_SLOW
        began_s = time.thread_time()  # of work: that the machine is busy is not the grammar's doing
        if not self._is_broken:
            self._inner.unsafe_compute_mask_ptr(_address(words), words.nbytes)
        error = self._recover(words, time.thread_time() - began_s)
        worked_s = time.thread_time() - began_s
        self.states.note_mask(worked_s)
        return self._note(worked_s, MAX_MASK_S) or error or self._measure()

    @property
    def states(self) -> Shared:
        """Masks by the same ones are filled one after the other."""
        return self._own or self._shared

    @property
    def inner(self) -> LLMatcher:
        """Fills its next mask, unless it is_alone."""
        return self._inner

    @property
    def is_alone(self) -> bool:
        """Its next mask is filled by fill_bitmask."""
        return self._is_broken or self._own is not None or self._shared.is_too_slow

    def note_filled(self, words: NDArray[np.int32], worked_s: float) -> str:
        """`inner` has filled `words`, in about so long. As fill_bitmask."""
        self._shared.note_mask(worked_s)
        self._worked_s += min(worked_s, MAX_TOKEN_S)  # more may be another's doing
        if self._inner.is_error() and (error := self._recover(words, worked_s)):
            return error
        return self._measure()

    def _note(self, worked_s: float, max_s: float) -> str:
        """A call has worked so long, and may for max_s: what is wrong with that, "" if nothing."""
        self._worked_s += worked_s
        # All sequences of a step wait for each mask, and the event loop for each token.
        if worked_s > max_s or self._worked_s > MAX_MASK_S + MAX_TOKEN_S * len(self._given):
            self._shared.drop(is_too_slow=True)
            return TOO_SLOW
        return ""

    def _measure(self) -> str:
        """From time to time: what the states take; why no more of them may be made, "" if so."""
        if self.states.is_measure_due:
            self.states.measure()
            if is_memory_full():
                self._shared.drop()
                return FULL
        return ""

    def _recover(self, words: NDArray[np.int32], worked_s: float) -> str:
        """Where `words` could not be filled, for which it has worked so long: fill them alone. As
        fill_bitmask.
        """
        if not (self._is_broken or self._inner.is_error()):
            return ""
        # What has taken long to fail would take as long again.
        if not (worked_s < MAX_MASK_S / 10 and self._go_on_alone()):
            self._shared.drop()
            return shortened(self._inner.get_error())
        self._inner.unsafe_compute_mask_ptr(_address(words), words.nbytes)
        return shortened(self._inner.get_error())

    def allows(self, token_id: int) -> bool:
        return self._is_broken or bool(self._inner.validate_tokens([token_id]))

    def consume(self, token_ids: list[int]) -> str:
        """Go on by these tokens; why it cannot, "" where it can."""
        self._given += token_ids
        if self._is_broken:
            return ""
        began_s = time.thread_time()
        is_taken = self._inner.consume_tokens(token_ids)
        worked_s = time.thread_time() - began_s
        self.states.unmeasured_s += worked_s
        error = self._note(worked_s, MAX_CONSUME_S)
        if error or is_taken:
            return error
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
        if renew is None or is_memory_full():
            return False
        try:
            own = renew()
        except RequestError:
            own = None
        if own is None or own.matcher is None:
            return False
        self._own, self._inner = own, own.matcher.deep_copy()
        self._is_broken = False
        self._inner.consume_tokens(self._given)
        return True


class MatcherBatch:
    """Fills masks of many answers.

    A call for one mask takes the interpreter's lock again at its end. Where other threads want it,
    the event loop or those that fill masks too, many masks are filled in one call, which costs as
    much as some quick ones. It tells how long they have taken together; where that is long, each
    mask of the next batch is a call, so that a grammar that takes too long is found.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()  # its executor: that works on a thread of its own
        self._num_long = 0

    def fill(
        self, matchers: Sequence[Matcher], rows: Sequence[int], bitmask: NDArray[np.int32], *,
        is_alone: bool,
    ) -> list[str]:  # fmt: skip
        """Row rows[i] of `bitmask` for matchers[i]; what Matcher.fill_bitmask says of each.

        is_alone  no other thread fills masks, and the event loop waits for these for QUICK_S.
        """
        errors = [""] * len(matchers)
        single_until_s = time.perf_counter() + QUICK_S if is_alone else 0.0
        is_watched = self._num_long % WATCHED_EVERY == 1
        self._num_long += is_watched
        call = partial(self._fill_part, single_until_s, matchers, rows, bitmask, errors)
        part: list[int] = []  # of a call: as many as end in time, at the pace of the last ones
        part_s = 0.0
        for i, matcher in enumerate(matchers):
            if is_watched or matcher.is_alone:
                errors[i] = matcher.fill_bitmask(bitmask[rows[i]])
                continue
            part.append(i)
            part_s += matcher.states.mask_s
            if part_s > MAX_CALL_S and len(part) >= MIN_CALL_ROWS:
                call(part)
                part, part_s = [], 0.0
        if part:
            call(part)
        return errors

    def _fill_part(
        self, single_until_s: float, matchers: Sequence[Matcher], rows: Sequence[int],
        bitmask: NDArray[np.int32], errors: list[str], part: Sequence[int],
    ) -> None:  # fmt: skip
        """For matchers[i] of each i in `part`: a call for each until then, one for the others."""
        engines = [(matchers[i].inner, rows[i]) for i in part]
        address, num_bytes = _address(bitmask), bitmask[0].nbytes
        num_single, began_s = 0, time.thread_time()
        for inner, row in engines:
            if time.perf_counter() >= single_until_s:
                break
            inner.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)
            num_single += 1
        worked_s = time.thread_time() - began_s
        if others := engines[num_single:]:
            began_s = time.perf_counter()
            self._executor().unsafe_compute_mask_ptr(others, address, num_bytes, len(bitmask))
            worked_s += time.perf_counter() - began_s
        self._num_long += worked_s > LONG_CALL_S
        expected_s = [matchers[i].states.mask_s for i in part]
        ratio = worked_s / sum(expected_s)
        for i, mask_s in zip(part, expected_s, strict=True):
            if error := matchers[i].note_filled(bitmask[rows[i]], ratio * mask_s):
                errors[i] = error

    def _executor(self) -> LLExecutor:
        executor: LLExecutor | None = getattr(self._of_thread, "executor", None)
        if executor is None:
            executor = self._of_thread.executor = LLExecutor(1)
        return executor


def _address(words: NDArray[np.int32]) -> int:
    address: int = words.__array_interface__["data"][0]
    return address


# How what the engine says begins, where it speaks of its own settings -> the same for a client.
_SAID = {
    "oneOf constraints are not supported": "its branches may hold together, as far as can be told: "
    "use anyOf, or give the branches a property that is required and has another const in each"
}


def shortened(error: str) -> str:
    """What the engine says in a line, without its own notes and a trace through itself."""
    for begin, said in _SAID.items():
        if error.startswith(begin):
            return said
    told = error.partition("<backtrace>")[0].partition("<state>")[0]
    lines = [line.strip() for line in told.splitlines()]
    lines = [line for line in lines if not line.startswith(("<", "while processing"))]
    return " ".join(filter(None, lines))[:MAX_ERROR_CHARS]
