"""What a strict decoder of a wire type refuses and a client may send all the same.

A whole number may be written with a point or an exponent: `1024.0` and `1e3` are integers. JSON
knows only numbers, and some languages write all of theirs with a point. And a field may be unknown:
it is left out, and its name told. What a strict decoder has refused is decoded here once more, more
slowly.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from pyserve.errors import InvalidRequestError

MAX_EXACT = 2**53  # a float holds every whole number up to it
MAX_NAMES = 32  # of unknown fields
MAX_NAME_CHARS = 64

T = TypeVar("T", bound=msgspec.Struct)

_Path = tuple["_Path", str | int] | None  # of a value in a body; written out where one is wrong
_SETTLED = frozenset({str, int, bool, type(None)})


def is_for_here(error: msgspec.ValidationError) -> bool:
    """Whether a body that a strict decoder has refused may pass here."""
    return "unknown field" in str(error) or "got `float`" in str(error)


class Lenient(Generic[T]):
    """Decodes one wire type."""

    def __init__(self, wire_type: type[T]) -> None:
        self._type = wire_type
        self._kind = _Kind(inspect.type_info(wire_type))

    def decode(self, body: bytes, unknown: Names) -> T:
        """As a strict decoder, but for whole numbers and unknown fields.

        unknown  takes the names of unknown fields that are not null; within lists without an
                 index, as in "messages.content.cache_control".

        Raises InvalidRequestError naming the field where a number with a fraction is in an
        integer's place or one is out of range, msgspec.ValidationError where anything else has a
        wrong type.
        """
        try:
            tree = _decoder.decode(body)
        except msgspec.ValidationError:  # an integer of thousands of digits
            raise _out_of_range(body) from None
        return msgspec.convert(_settle(tree, self._kind, None, unknown), self._type)


class Names:
    """The first MAX_NAMES of some names, each once, and one more to tell that there are others."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def is_full(self) -> bool:
        return len(self.names) > MAX_NAMES

    def add(self, name: str) -> None:
        """Keep `name`, unless it is known or there are enough."""
        if not self.is_full and name not in self.names:
            self.names.append(name)


class _Kind:
    """What a type says of numbers, and of what is in its objects and lists.

    prefix  of the names of its fields, as in "messages.content.".
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
    """`value` with its numbers as `kind` wants them and no field that `kind` has not.

    Values of a wrong type stay as they are.
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
    steps: list[str] = []
    while path is not None:
        path, step = path
        steps.append(step if isinstance(step, str) else f"[{step}]")
    return "".join(reversed(steps)).removeprefix(".")


def _whole_list(values: list[Any]) -> list[int] | None:
    """The fast way for a million token ids; None where it is not for `values`."""
    types = set(map(type, values))
    if types == {int}:
        return values
    if not types <= {int, float}:
        return None
    try:
        whole = list(map(int, values))
    except OverflowError:  # 1e999
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
    for name, raw in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items():
        try:
            _decoder.decode(raw)
        except msgspec.ValidationError:
            return InvalidRequestError(f"{name[:MAX_NAME_CHARS]}: number out of range", name)
    return InvalidRequestError("the body: number out of range")


def _parse(text: str) -> float | Decimal:
    value = float(text)
    if -MAX_EXACT < value < MAX_EXACT or math.isinf(value):
        return value
    return Decimal(text)


_decoder = msgspec.json.Decoder(float_hook=_parse)
