"""A whole number may be written with a point or an exponent: `1024.0` and `1e3` are integers.

JSON knows only numbers, and some languages write all of theirs with a point. A strict decoder takes
such a number for a float; what it has refused is decoded here once more, more slowly.
"""

from __future__ import annotations

import functools
import math
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from pyserve.errors import InvalidRequestError

MAX_EXACT = 2**53  # a float holds every whole number up to it

T = TypeVar("T", bound=msgspec.Struct)


def decode(body: bytes, wire_type: type[T]) -> T:
    """As a strict decoder of `wire_type`, but where an integer is due a whole number is one.

    Raises InvalidRequestError naming the field where a number with a fraction is in an integer's
    place, msgspec.ValidationError where anything else has a wrong type.
    """
    tree = _decoder.decode(body)
    if isinstance(tree, dict):
        tree = _settle(tree, _type_of(wire_type), "")
    return msgspec.convert(tree, wire_type)


def _parse(text: str) -> float | Decimal:
    value = float(text)
    if -MAX_EXACT < value < MAX_EXACT or math.isinf(value):
        return value
    return Decimal(text)


_decoder = msgspec.json.Decoder(float_hook=_parse)
_type_of = functools.cache(inspect.type_info)


def _settle(value: Any, kind: inspect.Type, path: str) -> Any:
    """`value` with its numbers as `kind` wants them; values of a wrong type stay as they are."""
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    if isinstance(value, float | Decimal):
        return _number(value, kinds, path)
    for one in kinds:
        if isinstance(value, dict) and isinstance(one, inspect.StructType):
            fields = {field.encode_name: field.type for field in one.fields}
            return {
                name: _settle(item, fields[name], f"{path}.{name}" if path else name)
                for name, item in value.items()
                if name in fields
            }
        if isinstance(value, dict) and isinstance(one, inspect.DictType | inspect.AnyType):
            inner = one.value_type if isinstance(one, inspect.DictType) else one
            return {name: _settle(item, inner, f"{path}[...]") for name, item in value.items()}
        if isinstance(value, list) and isinstance(one, inspect.ListType | inspect.AnyType):
            inner = one.item_type if isinstance(one, inspect.ListType) else one
            whole = _whole_list(value, inner)
            if whole is not None:
                return whole
            return [_settle(item, inner, f"{path}[{i}]") for i, item in enumerate(value)]
    return value


def _whole_list(values: list[Any], kind: inspect.Type) -> list[int] | None:
    """The fast way for a million token ids; None where it is not for `values`."""
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    if not set(map(type, values)) <= {int, float} or not _has_int(kinds):
        return None
    try:
        whole = list(map(int, values))
    except OverflowError:  # 1e999
        return None
    return whole if whole == values else None


def _has_int(kinds: tuple[inspect.Type, ...]) -> bool:
    return any(isinstance(one, inspect.IntType) for one in kinds)


def _number(value: float | Decimal, kinds: tuple[inspect.Type, ...], path: str) -> float | int:
    if math.isinf(value):
        raise InvalidRequestError(f"{path}: number out of range", path)
    if not _has_int(kinds):
        return float(value)
    if value != int(value):
        raise InvalidRequestError(f"{path} must be a whole number, got {value:g}", path)
    return int(value)
