"""The state of one answer in a grammar, and the memory and time that grammars take.

All answers to a grammar share the states of its lexer: the first answer pays for a state, later
ones find it made. Some grammars have practically endless states, so the engine limits their number;
once the limit is reached, no answer that shares them can go on. Such an answer then continues,
once, with states of its own. It fails only if its grammar is too complex for a single answer.

MAX_ALL_BYTES limits the memory of all grammars together, with their states. The engine does not
report bytes. It reports what the states have cost to make, in units of its own, and only in its
error messages, so that is where the cost is read from.

The engine holds a lock over the states while it fills a mask with them, so the masks of one grammar
are filled one after the other, on however many threads. A grammar whose masks take long therefore
has several copies (grammar.Compiled), whose answers share nothing and are filled in parallel.
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

# CPU time of one mask: tens of times what the first masks of large schemas take.
MAX_MASK_S = 0.1
MAX_TOKEN_S = 0.005  # CPU time of a mask and its token, once their states exist
MAX_CONSUME_S = 0.02  # CPU time to accept one token, for which the event loop waits
MAX_CALL_S = 0.01  # expected time of a call that fills the masks of several answers
QUICK_S = 0.004  # the event loop waits so long for masks: MAX_MASKS_S of AsyncEngine
MIN_CALL_ROWS = 8  # handing over fewer masks takes longer than filling them
LONG_CALL_S = 0.025
WATCHED_EVERY = 8  # about one in so many long calls has the next batch filled mask by mask
MAX_ALL_BYTES = 2**28  # estimated memory of all grammars in use or in the cache
# Bytes of states per unit of cost; measured: 3 to 30 with many states, up to 60 with few.
BYTES_PER_COST = 32
MASKS_OF_MEAN = 64  # a running mean over about so many; the first one replaces the trial's estimate
MAX_UNMEASURED_S = 0.005  # CPU time, in which at most 3 MB of states are made
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

# Words in errors that the shared states may have caused.
_OF_SHARED = ("lexer error", "panic", "Poison")


_all: WeakSet[Shared] = WeakSet()
_lock = threading.Lock()


class Shared:
    """What all answers to a grammar, or to one of its copies, share: its matcher and the states.

    matcher       at the beginning of the grammar. None once it is dropped: its states may take
                  hundreds of megabytes, and the next answer would fail with them as well.
    num_bytes     estimated memory: that of the compiled grammar plus that of the states which
                  answers had added by the last measurement.
    unmeasured_s  CPU time of answers since that measurement.
    is_too_slow   a mask has taken too long, in this or any other copy. No answer gets another mask,
                  because all sequences of a step wait for each mask.
    answers       the answers that use these states.
    mask_s        mean CPU seconds of the last masks, above 0.
    """

    def __init__(
        self, matcher: LLMatcher, num_bytes: int, *, mask_s: float, copy_of: Shared | None = None
    ) -> None:
        self.matcher: LLMatcher | None = matcher
        self.num_bytes = num_bytes
        self.unmeasured_s = 0.0
        self.answers: WeakSet[Matcher] = WeakSet()
        self._copy_of = copy_of  # None for the first copy: a reference to itself would be a cycle
        self._is_too_slow = False
        self.mask_s, self._num_masks = max(mask_s, 1e-6), 0
        self._cost = state_cost(matcher)
        self._measuring_s = 0.0  # duration of the last measurement
        with _lock:
            _all.add(self)

    @property
    def is_too_slow(self) -> bool:
        return (self._copy_of or self)._is_too_slow

    def note_mask(self, worked_s: float) -> None:
        """Count one mask that has taken `worked_s` seconds of CPU time."""
        self.unmeasured_s += worked_s
        self._num_masks = min(self._num_masks + 1, MASKS_OF_MEAN)
        self.mask_s += (worked_s - self.mask_s) / self._num_masks

    @property
    def is_measure_due(self) -> bool:
        """Whether to measure now. Measurements take at most a tenth of the time that masks take."""
        return self.unmeasured_s > max(MAX_UNMEASURED_S, 10 * self._measuring_s)

    def measure(self) -> None:
        """Update num_bytes. Takes a fraction of a millisecond if answers have used the states since
        the last measurement, and no time otherwise.
        """
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
    """Whether all grammars in use or in the cache together take more than MAX_ALL_BYTES."""
    with _lock:
        return sum([one.num_bytes for one in _all]) > MAX_ALL_BYTES


def measure_all() -> None:
    """Call `measure` on every Shared."""
    with _lock:
        each = list(_all)
    for one in each:
        one.measure()


def state_cost(matcher: LLMatcher) -> int:
    """What it has cost to make the states that `matcher` shares, in the engine's units: about 100
    for each state. The engine reports it only in error messages, so a copy of the matcher is given
    an invalid token. Returns 0 if the message does not hold the cost.
    """
    copy = matcher.deep_copy()
    copy.compute_bitmask()
    copy.consume_token(NO_TOKEN)
    found = _COST.search(copy.get_error())
    return int(found[1]) if found else 0


_COST = re.compile(r'"lexer_cost": (\d+)')


class Matcher:
    """Where one answer is in a grammar. Never used by two threads at once.

    The methods that return a string return why the answer cannot go on, or "" if it can.

    renew  makes a Shared at the beginning of the same grammar that no other answer uses; None if
           that would take too long. Raises RequestError.
    """

    def __init__(self, renew: Callable[[], Shared | None], shared: Shared) -> None:
        assert shared.matcher is not None
        self._inner: LLMatcher = shared.matcher.deep_copy()
        self._shared = shared  # used by other answers to the same grammar as well
        # Used by this answer alone; replaces _shared once that is broken.
        self._own: Shared | None = None
        self._renew: Callable[[], Shared | None] | None = renew
        self._given: list[int] = []
        self._worked_s = 0.0
        # The shared states are broken, so the next mask needs states of its own.
        self._is_broken = False
        shared.answers.add(self)

    @property
    def is_stopped(self) -> bool:
        """Whether only the end of the answer may follow."""
        return not self._is_broken and self._inner.is_stopped() and not self._inner.is_error()

    def fill_bitmask(self, words: NDArray[np.int32]) -> str:
        """Fill `words` as client.Constraint does. Returns why that is impossible, "" if done."""
        if self._shared.is_too_slow:
            return TOO_SLOW
        began_s = time.thread_time()  # CPU time: a busy machine is not the grammar's fault
        if not self._is_broken:
            self._inner.unsafe_compute_mask_ptr(_address(words), words.nbytes)
        error = self._recover(words, time.thread_time() - began_s)
        worked_s = time.thread_time() - began_s
        self.states.note_mask(worked_s)
        return self._note(worked_s, MAX_MASK_S) or error or self._measure()

    @property
    def states(self) -> Shared:
        """The states that the next mask uses. Masks of the same states are filled one by one."""
        return self._own or self._shared

    @property
    def inner(self) -> LLMatcher:
        """The engine's matcher, which fills the next mask unless `is_alone`."""
        return self._inner

    @property
    def is_alone(self) -> bool:
        """Whether the next mask must be filled by `fill_bitmask`, and not in a call with others."""
        return self._is_broken or self._own is not None or self._shared.is_too_slow

    def note_filled(self, words: NDArray[np.int32], worked_s: float) -> str:
        """Note that `inner` has filled `words` in about `worked_s` seconds. Returns as
        `fill_bitmask`.
        """
        self._shared.note_mask(worked_s)
        # The time was divided among several answers, so what is above the limit may be due to
        # another.
        self._worked_s += min(worked_s, MAX_TOKEN_S)
        if self._inner.is_error() and (error := self._recover(words, worked_s)):
            return error
        return self._measure()

    def _note(self, worked_s: float, max_s: float) -> str:
        """Count the CPU time of a call. Returns TOO_SLOW if it exceeds `max_s`, or if all calls of
        the answer together have taken too long, else "".
        """
        self._worked_s += worked_s
        # All sequences of a step wait for each mask, and the event loop waits for each token.
        if worked_s > max_s or self._worked_s > MAX_MASK_S + MAX_TOKEN_S * len(self._given):
            self._shared.drop(is_too_slow=True)
            return TOO_SLOW
        return ""

    def _measure(self) -> str:
        """Measure the states if that is due. Returns FULL if no more may be made, else ""."""
        if self.states.is_measure_due:
            self.states.measure()
            if is_memory_full():
                self._shared.drop()
                return FULL
        return ""

    def _recover(self, words: NDArray[np.int32], worked_s: float) -> str:
        """If the shared states have failed to fill `words`, which took `worked_s` seconds, continue
        with states of this answer's own and fill `words` with them. Returns as fill_bitmask.
        """
        if not (self._is_broken or self._inner.is_error()):
            return ""
        # If it took long to fail, it would take as long again.
        if not (worked_s < MAX_MASK_S / 10 and self._go_on_alone()):
            self._shared.drop()
            return shortened(self._inner.get_error())
        self._inner.unsafe_compute_mask_ptr(_address(words), words.nbytes)
        return shortened(self._inner.get_error())

    def allows(self, token_id: int) -> bool:
        return self._is_broken or bool(self._inner.validate_tokens([token_id]))

    def consume(self, token_ids: list[int]) -> str:
        """Advance by these tokens. Returns why that is impossible, "" if it is done."""
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
        """Go back by `num_tokens` tokens. Returns why that is impossible, "" if it is done."""
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
    """Fills the masks of many answers.

    At the end of a call into the engine, the thread must take the interpreter's lock again. If
    other threads compete for it (the event loop, or other threads that fill masks), many masks are
    filled in one call, whose overhead is that of several quick masks. Such a call only tells the
    time of all its masks together. After a long one, the next batch is filled with one call per
    mask, so that the grammar which is too slow is found.
    """

    def __init__(self) -> None:
        # Each calling thread's executor, which works on a thread of its own.
        self._of_thread = threading.local()
        self._num_long = 0

    def fill(
        self, matchers: Sequence[Matcher], rows: Sequence[int], bitmask: NDArray[np.int32], *,
        is_alone: bool,
    ) -> list[str]:  # fmt: skip
        """Fill row rows[i] of `bitmask` for matchers[i]. Returns for each what Matcher.fill_bitmask
        does.

        is_alone  no other thread fills masks now, and the event loop waits QUICK_S for these: until
                  then, one call per mask costs least.
        """
        errors = [""] * len(matchers)
        single_until_s = time.perf_counter() + QUICK_S if is_alone else 0.0
        is_watched = self._num_long % WATCHED_EVERY == 1
        self._num_long += is_watched
        call = partial(self._fill_part, single_until_s, matchers, rows, bitmask, errors)
        part: list[int] = []  # indices for the next call, as many as should end within MAX_CALL_S
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
        """Fill the masks of matchers[i] for each i in `part`: with one call each until
        `single_until_s`, and the remaining ones with a single call.
        """
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


# The beginning of an error that speaks of the engine's own settings -> what a client is told
# instead.
_SAID = {
    "oneOf constraints are not supported": "its branches may hold together, as far as can be told: "
    "use anyOf, or give the branches a property that is required and has another const in each"
}


def shortened(error: str) -> str:
    """An error message of the engine in one line, without its notes and backtrace."""
    for begin, said in _SAID.items():
        if error.startswith(begin):
            return said
    told = error.partition("<backtrace>")[0].partition("<state>")[0]
    lines = [line.strip() for line in told.splitlines()]
    lines = [line for line in lines if not line.startswith(("<", "while processing"))]
    return " ".join(filter(None, lines))[:MAX_ERROR_CHARS]
