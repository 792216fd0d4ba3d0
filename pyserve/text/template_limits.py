"""The limits of a chat template: its time, and the size of everything that it makes.

A template is untrusted code that runs on a thread, and a thread cannot be killed. So its loops,
calls, filters and operators report to a Meter here (template_source.py inserts the reports), which
stops the template from within by raising. A single call of C code cannot be stopped at all, so the
value that it would make is measured before it is made.

The weight of a value is its length if it were printed, in characters. Each element of a list or
dict adds ELEMENT characters to its own weight; a list that holds another list twice counts it
twice. No value may weigh more than `limit`, so no single operation takes longer than a fraction of
a second.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from itertools import islice
from typing import Any

MAX_RENDER_S = 5.0
MAX_CHARS = 2**23  # weight of one value; twice the weight of the request's data, if that is more
MAX_OUTPUTS = 4  # all output together, macros included, in multiples of that weight
MAX_MADE = 2**28  # size of all values that are made; MADE_OF_DATA times the data, if that is more
MADE_OF_DATA = 32
MAX_DEPTH = 100
MAX_INT_BITS = 4096
MAX_SET_CHARS = 256  # characters that strip() compares each character with
MAX_SEARCH = 2**28  # length of a text times that of a text searched for from its end
MAX_CASE_CHARS = 2**21  # non-ASCII text that changes its case or is URL-encoded
MAX_ESCAPED = 2**20  # text that is escaped: each character may become ten
MAX_SORTED = 2**15  # number of items to sort
MAX_SORTED_CHARS = 2**21  # weight of what is sorted if it holds lists, which take longer to compare
MAX_KEY = 2**61 - 1  # numbers as dict keys: its multiples all have the same hash
MAX_FORMAT_CHARS = 2**16
MAX_WIDTH = 10**5  # padding, rows and columns
ELEMENT = 32
TICK = 256  # cost of one operation of the template, towards the next look at the clock
CLOCK_EVERY = 16 * TICK
MAX_KNOWN = 2**16

_DIGITS = re.compile(r"\d+").findall
# Each of these looks at a character only once: with [^{}] in the last, ":" * 65536 took 15 s. The
# first takes any "%(" for an escape, as a name in parentheses may hold anything and an "a" may
# follow it.
_PERCENT_ESCAPES = re.compile(r"%[-#0 +.\dhlL]*[ar(]").search
_FORMAT_ESCAPES = re.compile(r"![ar]").search
_NESTED_SPEC = re.compile(r":[^:{}]*\{").search
_VIEWS = (KeysView, ValuesView, ItemsView)
_CONTAINERS = (list, tuple, dict)
_SIZED = (*_CONTAINERS, *_VIEWS, range, str)

_SEARCHES = frozenset("rfind rindex rpartition rsplit split".split())
_CASES = frozenset("capitalize casefold lower swapcase title upper".split())

# Methods whose result is no larger than their input, or can be measured before.
STR_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum "
    "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
    "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "zfill".split()
)
OTHER_METHODS = frozenset("bit_length copy count get index is_integer items keys values".split())


class TemplateLimitError(Exception):
    """A template has exceeded a limit. is_time: it took too long, rather than making too much."""

    def __init__(self, message: str, *, is_time: bool = False) -> None:
        super().__init__(message)
        self.is_time = is_time


class Meter:
    """Counts the cost of one rendering, on one thread, and raises TemplateLimitError at a limit.

    time_limit_s  seconds that the rendering may take.
    data          what the template is rendered with; more data raises the limits.
    began_s       the time.monotonic() at which the time begins; None: now.
    """

    def __init__(
        self,
        time_limit_s: float = MAX_RENDER_S,
        *,
        data: object = None,
        began_s: float | None = None,
    ) -> None:
        self._deadline_s = (time.monotonic() if began_s is None else began_s) + time_limit_s
        self._time_limit_s = time_limit_s
        self._unchecked = 0
        self._made = 0
        self._known: dict[int, tuple[object, int]] = {}
        self.limit = MAX_MADE
        given = self.weigh(data)
        self.limit = max(MAX_CHARS, 2 * given)
        self._made_limit = max(MAX_MADE, MADE_OF_DATA * given)
        self._output_left = MAX_OUTPUTS * self.limit

    def tick(self, cost: int = TICK) -> None:
        """Count `cost` towards the next look at the clock. Raises TemplateLimitError once time is
        over.
        """
        self._unchecked += cost
        if self._unchecked >= CLOCK_EVERY:
            self._unchecked = 0
            if time.monotonic() > self._deadline_s:
                raise TemplateLimitError(
                    f"takes longer than {self._time_limit_s:g} s", is_time=True
                )

    def require(self, weight: int) -> None:
        """Check that a value of this weight may be made. Raises TemplateLimitError."""
        if weight > self.limit:
            raise TemplateLimitError(f"makes a value of more than {self.limit} characters")

    def made(self, value: Any) -> Any:
        """Count a value that the template has made, and return it. Raises TemplateLimitError."""
        self.weigh(value)
        size = 0
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, _CONTAINERS):
            # Lists of lists, such as `batch` makes, cost Python's garbage collector more.
            size = ELEMENT * (len(value) + 2 * sum(isinstance(x, _CONTAINERS) for x in value))
        self._made += size
        if self._made > self._made_limit:
            raise TemplateLimitError(f"makes more than {self._made_limit} characters in all")
        self.tick(TICK + size)
        return value

    def output(self, value: Any) -> Any:
        """Count a value that the template prints, and return it. Raises TemplateLimitError."""
        self.emit(self.weigh(value))
        return value

    def emit(self, num_chars: int) -> None:
        """Count `num_chars` printed characters. Raises TemplateLimitError."""
        self._output_left -= num_chars
        if self._output_left < 0:
            raise TemplateLimitError(f"prints more than {MAX_OUTPUTS * self.limit} characters")
        self.tick(TICK + num_chars)

    def weigh(self, value: object, depth: int = 0) -> int:
        """The weight of a value. Raises TemplateLimitError if it exceeds the limit."""
        if isinstance(value, str):
            weight = len(value)
        elif isinstance(value, _CONTAINERS):
            known = self._known.get(id(value))  # containers do not change while a template runs
            if known is not None:
                return known[1]
            weight = self._weigh_items(value, depth)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[id(value)] = (value, weight)
            return weight
        elif isinstance(value, int):
            weight = value.bit_length()
            if weight > MAX_INT_BITS:
                raise TemplateLimitError(f"makes a number of more than {MAX_INT_BITS} bits")
            return 1 + weight // 3
        elif isinstance(value, _VIEWS):
            return self._weigh_items(value, depth)
        else:
            return ELEMENT
        self.require(weight)
        return weight

    def _weigh_items(self, value: Any, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise TemplateLimitError(f"nests values more than {MAX_DEPTH} deep")
        weight = ELEMENT * (1 + len(value))
        self.require(weight)
        for item in value:
            weight += self.weigh(item, depth + 1)
            if isinstance(value, dict):
                weight += self.weigh(value[item], depth + 1)
            self.require(weight)
        return weight

    def take(self, iterable: Iterable[Any]) -> list[Any]:
        """The items of an iterable, even a generator, as a list. Raises TemplateLimitError."""
        items = []
        for item in islice(iter(iterable), self.limit // ELEMENT + 1):
            self.tick(ELEMENT)  # a generator may take long for each item
            items.append(item)
        self.require(ELEMENT * len(items))
        return items

    def check_items(self, value: object) -> None:
        """Before a filter walks through the items of `value`, which are characters if
        it is a text.
        """
        if isinstance(value, str):
            self.require(ELEMENT * len(value))

    def check_case(self, value: object) -> None:
        """Before an operation that is slow for non-ASCII characters."""
        if isinstance(value, str) and not value.isascii():
            self.check_length(value, MAX_CASE_CHARS)

    def check_sorted(self, value: object) -> None:
        """Before `value` is sorted: nothing can stop a sort between two comparisons."""
        if isinstance(value, Iterator):
            raise TemplateLimitError("sorts what is not made yet")
        if not isinstance(value, _SIZED):
            return
        self._check_num_sorted(len(value))
        items = value.values() if isinstance(value, dict) else value
        if any(isinstance(item, _CONTAINERS) for item in items):
            if self.weigh(value) > MAX_SORTED_CHARS:
                raise TemplateLimitError(f"sorts lists of more than {MAX_SORTED_CHARS} characters")

    def check_sorted_keys(self, value: object) -> None:
        """Before the keys of all dicts in `value` are sorted."""
        self.tick(ELEMENT)
        if isinstance(value, dict):
            self._check_num_sorted(len(value))
        if isinstance(value, _CONTAINERS):
            for item in value.values() if isinstance(value, dict) else value:
                self.check_sorted_keys(item)

    def _check_num_sorted(self, num_items: int) -> None:
        if num_items > MAX_SORTED:
            raise TemplateLimitError(f"sorts more than {MAX_SORTED} items")

    def check_escaped(self, value: object) -> None:
        """Before `value` is written in ASCII, or as Python's repr writes it."""
        if self.weigh(value) > MAX_ESCAPED:
            raise TemplateLimitError(f"escapes more than {MAX_ESCAPED} characters")

    def check_key(self, key: object) -> None:
        """Before a value becomes a key of a dict: keys with equal hashes take quadratic time.

        Python randomises the hashes of texts. For large numbers, complex numbers and tuples anybody
        can compute values with equal hashes, so these are refused.
        """
        self.tick(ELEMENT)
        if isinstance(key, int | float) and abs(key) >= MAX_KEY:
            raise TemplateLimitError(f"uses a number of {MAX_KEY} or more as a key")
        if not isinstance(key, str | int | float | None):
            raise TemplateLimitError(f"uses a {type(key).__name__} as a key")

    def take_pairs(self, source: Any) -> Any:
        """The argument of dict(), with its pairs taken and their keys checked."""
        if isinstance(source, dict):
            return source
        pairs = [self.take(pair) for pair in self.take(source)]
        for pair in pairs:
            self.check_key(pair[0] if pair else None)
        return pairs

    def check_binop(self, operator: str, left: Any, right: Any) -> None:
        """Before `left operator right` is computed."""
        self.tick()
        if isinstance(left, int) and isinstance(right, int):
            self._check_numbers(operator, left, right)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.require(self.weigh(left) + self.weigh(right))
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(count, int) and hasattr(sequence, "__len__"):
                    self.require(self.weigh(sequence) * max(count, 0))
        elif operator == "%" and isinstance(left, str):
            self.check_percent(left, right)
        elif operator == "-" and isinstance(left, _VIEWS) | isinstance(right, _VIEWS):
            # With keys or items on either side, Python makes a set of the left side: see check_key.
            raise TemplateLimitError("subtracts with the keys or items of an object")

    def _check_numbers(self, operator: str, left: int, right: int) -> None:
        bits = max(self.weigh(left), self.weigh(right))  # weigh refuses larger numbers by itself
        if operator == "**":
            bits = abs(left).bit_length() * max(right, 0)
        if bits > MAX_INT_BITS:
            raise TemplateLimitError(f"makes a number of more than {MAX_INT_BITS} bits")

    def check_percent(self, text: str, values: Any) -> None:
        """Before `text % values` is computed."""
        self.check_length(text, MAX_FORMAT_CHARS)
        if _PERCENT_ESCAPES(text):
            self.check_escaped(values)
        if "*" in text and "%" in text:
            raise TemplateLimitError("takes a width from a value")
        self._check_fields(text, text.count("%"), self.weigh(values))

    def check_format(self, text: str, values: list[Any]) -> None:
        """Before `text.format(...)` of these values is called."""
        self.check_length(text, MAX_FORMAT_CHARS)
        if _NESTED_SPEC(text):
            raise TemplateLimitError("takes a width from a value")
        if _FORMAT_ESCAPES(text):
            self.check_escaped(values)
        self._check_fields(text, text.count("{"), max(map(self.weigh, values), default=0))

    def _check_fields(self, text: str, num_fields: int, heaviest: int) -> None:
        widths = _DIGITS(text) if num_fields else []
        if any(len(width) > 9 for width in widths):
            raise TemplateLimitError("pads a value too far")
        self.require(len(text) + num_fields * heaviest + sum(map(int, widths)))

    def check_width(self, *widths: Any) -> None:
        """Before a value is padded to these widths, in columns."""
        if any(isinstance(width, int) and abs(width) > MAX_WIDTH for width in widths):
            raise TemplateLimitError(f"pads a value to more than {MAX_WIDTH} columns")

    def check_pieces(self, text: str, separator: object, most: object = -1) -> None:
        """Before `text.split(separator, most)` is called; not for splits at white space."""
        if isinstance(separator, str) and separator:
            num_cuts = text.count(separator)
            if isinstance(most, int) and most >= 0:
                num_cuts = min(num_cuts, most)
            self.require(ELEMENT * (1 + num_cuts))

    def check_length(self, value: object, limit: int = MAX_SET_CHARS) -> None:
        """Before an operation that may go through `value` more than once."""
        if isinstance(value, str) and len(value) > limit:
            raise TemplateLimitError(f"uses a text of more than {limit} characters")

    def check_replace(self, text: str, old: object, new: object, count: object = None) -> None:
        """Before `text.replace(old, new, count)` is called."""
        if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
            num_found = text.count(old)
            if isinstance(count, int) and count >= 0:
                num_found = min(num_found, count)
            self.require(len(text) + num_found * (len(new) - len(old)))

    def check_join(self, separator: str, items: list[Any]) -> None:
        """Before `separator.join(items)` is called."""
        weight = len(separator) * len(items)
        for item in items:
            weight += self.weigh(item)
            self.require(weight)

    def check_call(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Before a call. Returns the arguments to use. Raises TemplateLimitError if it
        is refused.
        """
        self.tick()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name not in STR_METHODS:
                raise TemplateLimitError(f"calls a method of text that is not allowed: {name}")
            if name in ("format", "format_map"):
                self.check_format(owner, [*args, *kwargs.values()])
            return self._check_str_method(owner, name, args, kwargs)
        is_plain = isinstance(owner, (*_CONTAINERS, *_VIEWS, int, float, bytes, set, range))
        if is_plain and name not in OTHER_METHODS:
            raise TemplateLimitError(f"calls a method that is not allowed: {name}")
        return args

    def _check_str_method(
        self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        if name in ("center", "ljust", "rjust", "zfill"):
            self.check_width(*args)
        elif name in ("strip", "lstrip", "rstrip") and args:
            self.check_length(args[0])
        elif name == "expandtabs":
            size = kwargs.get("tabsize", args[0] if args else 8)
            self.check_width(size)
            self.require(len(text) + text.count("\t") * max(size, 0))
        elif name in _SEARCHES:
            # From the end, CPython may compare at each position anew; from the start it does not.
            needle = args[0] if args else kwargs.get("sep")
            is_far = isinstance(needle, str) and len(text) * len(needle) > MAX_SEARCH
            if is_far and name != "split":
                raise TemplateLimitError("looks for too long a text from the end of another")
            if name in ("split", "rsplit"):
                self.check_pieces(text, needle, args[1] if args[1:] else kwargs.get("maxsplit"))
        elif name in _CASES:
            self.check_case(text)
        elif name == "replace" and len(args) > 1:
            self.check_replace(text, *args[:3])
        elif name == "join" and args:
            items = self.take(args[0])
            self.check_join(text, items)
            return (items,)
        return args


_active = threading.local()


@contextmanager
def metering(meter: Meter) -> Iterator[None]:
    """Make the templates that this thread renders within the block report to `meter`."""
    before = getattr(_active, "meter", None)
    _active.meter = meter
    try:
        yield
    finally:
        _active.meter = before


def active() -> Meter:
    """The meter of the rendering on this thread."""
    meter: Meter = _active.meter
    return meter
