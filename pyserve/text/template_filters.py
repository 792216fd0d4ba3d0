"""The filters and tests of chat templates: jinja's own, with their cost measured.

Where a filter of jinja returns a generator, these return a list, so that it can be weighed
(template_limits.py). Filters for web pages, which no chat template needs, are left out: urlize,
wordwrap, wordcount, striptags, xmlattr, pprint, filesizeformat.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import Environment, pass_environment
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import LoopContext, str_join
from jinja2.tests import TESTS

from pyserve.text.template_limits import ELEMENT, TemplateLimitError, active

Filter = Callable[..., Any]

MAX_PRECISION = 100
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines breaks lines
MAX_TITLE_CHARS = 2**20
MAX_NUMBER_CHARS = 2**16
# Names of the filters that template_source.py inserts; no template can spell a name with a space.
TICK, EMIT, MADE, CONCAT = "pyserve tick", "pyserve emit", "pyserve made", "pyserve concat"
TAKE, KEY = "pyserve take", "pyserve key"

_NAMES = (
    "abs attr capitalize count d default dictsort e escape first float forceescape groupby int "
    "items last length list lower map max min random reject rejectattr reverse safe select "
    "selectattr sort string unique upper urlencode"
).split()

# Filters that walk through their input item by item, and filters that are slow for non-ASCII text.
_BY_ITEM = frozenset(
    "batch dictsort groupby map max min random reject rejectattr select selectattr slice sort "
    "unique".split()
)
_BY_CHARACTER = frozenset("capitalize lower title upper urlencode".split())
_SORTING = frozenset("dictsort groupby sort".split())
# Convert texts, of which too many digits are not accepted anyway.
_NUMBERS = frozenset("float int".split())


def make_filters() -> dict[str, Filter]:
    """Filter name -> filter, for Environment.filters. They work only while a Meter is active."""
    filters = {name: _measured(name, FILTERS[name]) for name in _NAMES}
    for name, check in _CHECKS.items():
        filters[name] = _measured(name, FILTERS[name], check)
    own: dict[str, Filter] = {"join": _join, "sum": _sum, "tojson": _tojson, "list": _list}
    filters |= {name: _measured(name, function) for name, function in own.items()}
    filters |= {TICK: _tick, EMIT: _emit, MADE: _made, CONCAT: _concat, TAKE: _take, KEY: _key}
    return filters


def make_tests() -> dict[str, Filter]:
    """Test name -> test, for Environment.tests."""
    tests: dict[str, Any] = {**TESTS}
    return {name: _ticking(test) for name, test in tests.items()}


def _ticking(function: Filter) -> Filter:
    @functools.wraps(function)
    def ticking(*args: Any, **kwargs: Any) -> Any:
        active().tick()
        return function(*args, **kwargs)

    return ticking


def _measured(name: str, function: Filter, check: Filter | None = None) -> Filter:
    # Jinja passes the environment or the context first.
    num_before = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)  # copies jinja's marks, such as pass_environment
    def measured(*args: Any, **kwargs: Any) -> Any:
        meter = active()
        meter.tick()
        value = args[num_before] if len(args) > num_before else None
        if name in _BY_ITEM:
            meter.check_items(value)
        if name in _SORTING:
            meter.check_sorted(value)
        elif name in _NUMBERS:
            meter.check_length(value, MAX_NUMBER_CHARS)
        elif name in _BY_CHARACTER:
            meter.check_case(value)
        if check is not None:
            check(*args, **kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator) and not isinstance(result, LoopContext):
            result = meter.take(result)
        return meter.made(result)

    return measured


def _check_center(value: object, width: object = 80) -> None:
    active().check_width(width)


def _check_columns(value: object, columns: object, fill_with: object = None) -> None:
    active().check_width(columns)


def _check_format(value: Any, *args: Any, **kwargs: Any) -> None:
    active().check_percent(str(value), list(args) or kwargs)


def _check_indent(s: str, width: Any = 4, first: object = False, blank: object = False) -> None:
    meter = active()
    meter.check_width(width)
    columns = len(width) if isinstance(width, str) else max(int(width), 0)
    num_lines = 1 + sum(map(s.count, LINE_ENDS))
    meter.require(len(s) + columns * num_lines + ELEMENT * num_lines)


def _check_replace(context: object, s: Any, old: Any, new: Any, count: object = None) -> None:
    active().check_replace(str(s), str(old), str(new), count)


def _check_round(value: object, precision: object = 0, method: object = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > MAX_PRECISION:
        raise TemplateLimitError(f"rounds to more than {MAX_PRECISION} places")


def _check_title(s: object) -> None:
    active().check_length(s, MAX_TITLE_CHARS)


def _check_trim(value: object, chars: object = None) -> None:
    active().check_length(chars)


def _check_truncate(
    environment: object, s: object, length: object = 255, *args: object, **kwargs: object
) -> None:
    active().check_width(length)


_CHECKS: dict[str, Filter] = {
    "batch": _check_columns,
    "center": _check_center,
    "format": _check_format,
    "indent": _check_indent,
    "replace": _check_replace,
    "round": _check_round,
    "slice": _check_columns,
    "title": _check_title,
    "trim": _check_trim,
    "truncate": _check_truncate,
}


def _list(value: Iterable[Any]) -> list[Any]:
    return active().take(value)


@pass_environment
def _join(
    environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    meter = active()
    items = meter.take(value)
    if attribute is not None:
        items = list(map(make_attrgetter(environment, attribute), items))
    meter.check_join(d, items)
    return str(d).join(map(str, items))


@pass_environment
def _sum(
    environment: Environment,
    iterable: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    meter = active()
    get = None if attribute is None else make_attrgetter(environment, attribute)
    total = start
    for item in meter.take(iterable):
        value = item if get is None else get(item)
        meter.check_binop("+", total, value)
        total = meter.made(total + value)
    return total


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, unlike jinja's own filter, which escapes HTML."""
    meter = active()
    meter.weigh(value)
    if ensure_ascii:
        meter.check_escaped(value)
    if sort_keys:
        meter.check_sorted_keys(value)
    meter.check_width(indent)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)  # in C; the result is as large as `value`
    pieces = []
    num_chars = 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        num_chars += len(piece)
        meter.require(num_chars)
        meter.tick(len(piece))
    return "".join(pieces)


def _tick(value: Any) -> Any:
    active().tick()
    return value


def _emit(num_chars: int) -> None:
    active().emit(num_chars)


def _made(value: Any) -> Any:
    return active().made(value)


def _take(value: Any) -> Any:
    return active().take(value)


def _key(value: Any) -> Any:
    active().check_key(value)
    return value


def _concat(*values: Any) -> str:
    meter = active()
    meter.check_join("", list(values))
    text: str = meter.made(str_join(values))
    return text
