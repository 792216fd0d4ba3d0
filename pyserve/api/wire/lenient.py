"""A second, lenient decoding of bodies that the strict decoder of a wire type has refused.

It accepts two things. An integer may be written with a decimal point or an exponent, as in `1024.0`
and `1e3`: JSON has only one kind of number, and some languages write all theirs with a point. And a
field may be unknown: it is dropped, and its name is reported. This decoding is slower than the
strict one.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from pyserve.errors import InvalidRequestError

MAX_EXACT = 2**53  # a float represents every whole number up to this one exactly
MAX_NAMES = 32  # names of ignored fields that a response lists
MAX_NAME_CHARS = 64  # a longer name is cut

T = TypeVar("T", bound=msgspec.Struct)

# The place of a value in a body: that of its container and the last step, a name or an index. None
# is the body itself. `_written` makes the text, which only an error needs.
_Path = tuple["_Path", str | int] | None
_SETTLED = frozenset({str, int, bool, type(None)})  # types of values that `_settle` never changes


def is_for_here(error: msgspec.ValidationError) -> bool:
    """Whether the error of the strict decoder is one that the lenient decoding may tolerate."""
    return "unknown field" in str(error) or "got `float`" in str(error)


class Lenient(Generic[T]):
    """The lenient decoder of one wire type."""

    def __init__(self, wire_type: type[T]) -> None:
        self._type = wire_type
        self._kind = _Kind(inspect.type_info(wire_type))

    def decode(self, body: bytes, unknown: Names) -> T:
        """Decode `body`, accepting whole numbers in any notation and unknown fields.

        unknown  collects the names of unknown fields whose value is not null. Names within lists
                 have no index, as in "messages.content.cache_control".

        Raises InvalidRequestError naming the field if a number is out of range, or has a fraction
        where an integer is wanted; msgspec.ValidationError for any other wrong type.
        """
        try:
            tree = _decoder.decode(body)
        except msgspec.ValidationError:  # an integer with too many digits for Python to parse
            raise _out_of_range(body) from None
        return msgspec.convert(_settle(tree, self._kind, None, unknown), self._type)


class Names:
    """Collects names without duplicates, up to MAX_NAMES and one more, which tells that there are
    further ones."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def is_full(self) -> bool:
        return len(self.names) > MAX_NAMES

    def add(self, name: str) -> None:
        """Add `name`, unless it is already there or the collection is full."""
        if not self.is_full and name not in self.names:
            self.names.append(name)


class _Kind:
    """What `_settle` needs to know about the type of a value.

    prefix     put before the names of its fields, as in "messages.content.".
    has_int    the value may be an integer.
    fields     name of a field -> its type, if the value is a Struct; unknown names are dropped.
    of_object  the type of the values of a dict.
    of_list    the type of the elements of a list.
    """

    __slots__ = ("prefix", "has_int", "fields", "of_object", "of_list")

    def __init__(self, kind: inspect.Type, prefix: str = "") -> None:
        self.prefix = prefix
        kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
        self.has_int = any(isinstance(one, inspect.IntType) for one in kinds)
        self.fields: dict[str, _Kind] | None = None
        self.of_object: _Kind | None = None
        self.of_list: _Kind | None = None
        for one in kinds:
            if isinstance(one, inspect.StructType):
                self.fields = {
                    field.encode_name: _Kind(field.type, f"{prefix}{field.encode_name}.")
                    for field in one.fields
                }
            elif isinstance(one, inspect.DictType):
                self.of_object = _Kind(one.value_type, prefix)
            elif isinstance(one, inspect.ListType):
                self.of_list = _Kind(one.item_type, prefix)
            elif isinstance(one, inspect.AnyType):
                self.of_object = self.of_list = self


def _settle(value: Any, kind: _Kind, path: _Path, unknown: Names) -> Any:
    """Convert the numbers in `value` as `kind` requires, and drop fields that `kind` does not have.

    Lists and dicts are changed in place. Values of a wrong type stay as they are: msgspec.convert
    reports them afterwards.
    """
    if isinstance(value, float | Decimal):
        return _number(value, kind, path)
    if isinstance(value, dict):
        if kind.fields is not None:
            fields = kind.fields
            for name in [name for name in value if name not in fields]:
                if value.pop(name) is not None:
                    unknown.add(kind.prefix + name)
            for name, item in value.items():
                if item.__class__ not in _SETTLED:
                    value[name] = _settle(item, fields[name], (path, f".{name}"), unknown)
        elif kind.of_object is not None:
            inner = kind.of_object
            for name, item in value.items():
                if item.__class__ not in _SETTLED:
                    value[name] = _settle(item, inner, (path, "[...]"), unknown)
    elif isinstance(value, list) and kind.of_list is not None:
        inner = kind.of_list
        whole = _whole_list(value) if inner.has_int else None
        if whole is not None:
            return whole
        for i, item in enumerate(value):
            if item.__class__ not in _SETTLED:
                value[i] = _settle(item, inner, (path, i), unknown)
    return value


def _written(path: _Path) -> str:
    """A path as text, such as "messages[0].content"."""
    steps: list[str] = []
    while path is not None:
        path, step = path
        steps.append(step if isinstance(step, str) else f"[{step}]")
    return "".join(reversed(steps)).removeprefix(".")


def _whole_list(values: list[Any]) -> list[int] | None:
    """A list of numbers as integers, fast enough for a million token ids.

    None if not all elements are whole numbers; `_settle` then goes through them one by one.
    """
    types = set(map(type, values))
    if types == {int}:
        return values
    if not types <= {int, float}:
        return None
    try:
        whole = list(map(int, values))
    except OverflowError:  # an infinity, as 1e999 makes
        return None
    return whole if whole == values else None


def _number(value: float | Decimal, kind: _Kind, path: _Path) -> float | int:
    if math.isinf(value):
        raise InvalidRequestError(f"{_written(path)}: number out of range", _written(path))
    if not kind.has_int:
        return float(value)
    if value != int(value):
        raise InvalidRequestError(
            f"{_written(path)} must be a whole number, got {value:g}", _written(path)
        )
    return int(value)


def _out_of_range(body: bytes) -> InvalidRequestError:
    """The error for a body with a number that cannot be decoded, naming its top-level field."""
    for name, raw in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items():
        try:
            _decoder.decode(raw)
        except msgspec.ValidationError:
            return InvalidRequestError(f"{name[:MAX_NAME_CHARS]}: number out of range", name)
    return InvalidRequestError("the body: number out of range")


def _parse(text: str) -> float | Decimal:
    """A number with a point or an exponent; a Decimal if a float might not represent it exactly.

    Infinity, for a number out of range, stays a float.
    """
    value = float(text)
    if -MAX_EXACT < value < MAX_EXACT or math.isinf(value):
        return value
    return Decimal(text)


_decoder = msgspec.json.Decoder(float_hook=_parse)
