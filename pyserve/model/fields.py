"""Fields: typed access to a JSON object of a model's files. Errors name key, value and limit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pyserve.errors import ConfigError

MAX_SHOWN_CHARS = 80  # length to which error messages cut a refused value


class Fields:
    """Reads keys of `raw`. Every reading method raises ConfigError for a wrong or missing value.

    where   what messages call the object, for example "config.json".

    A missing key gives `default`, and raises if there is none. A key that is null differs from a
    missing one, as transformers applies its default only to the latter: null raises too, unless
    `is_nullable` says that it means the default. A null boolean is false, as in Python. Numbers
    must be in [low, high].
    """

    __slots__ = ("_raw", "_where")

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where

    def has(self, key: str) -> bool:
        """True if the key is present and not null."""
        return self._raw.get(key) is not None

    def is_null(self, key: str) -> bool:
        """True if the key is present and null."""
        return key in self._raw and self._raw[key] is None

    def integer(
        self, key: str, low: int, high: int, *, default: int | None = None,
        is_nullable: bool = False,
    ) -> int:  # fmt: skip
        value = self._get(key, default, is_nullable)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, f"must be an integer in [{low}, {high}]")
        return value

    def number(
        self, key: str, low: float, high: float, *, default: float | None = None,
        is_nullable: bool = False,
    ) -> float:  # fmt: skip
        value = self._get(key, default, is_nullable)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # The bounds come first: math.isfinite raises for an integer that is too large for a float.
        if not is_number or not low <= value <= high or not math.isfinite(value):
            raise self.refuse(key, f"must be a number in [{low:g}, {high:g}]")
        return float(value)

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        values = self._get(key, None)
        rule = f"must be a list of numbers in [{low:g}, {high:g}]"
        if not isinstance(values, list):
            raise self.refuse(key, rule)
        for value in values:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:  # the comparison is false for a NaN
                raise self.refuse(key, rule)
        return tuple(map(float, values))

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers; () if the key is absent or null."""
        values = self._raw.get(key)
        if values is None:
            return ()
        if not isinstance(values, list) or not all(
            isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            for value in values
        ):
            raise self.refuse(key, f"must be a list of integers in [{low}, {high}]")
        return tuple(values)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = False if self.is_null(key) else self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def string(self, key: str, *, default: str | None = None, is_nullable: bool = False) -> str:
        value = self._get(key, default, is_nullable)
        if not isinstance(value, str):
            raise self.refuse(key, "must be a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(key, "must be a list of strings")
        return value

    def table(self, key: str) -> Fields:
        """The object under `key`, as Fields."""
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self.refuse(key, "must be an object")
        return Fields(value, f"{self._where}: {key}")

    @property
    def size(self) -> int:
        """The number of keys."""
        return len(self._raw)

    def tables(self) -> list[str]:
        """The keys whose values are objects."""
        return [key for key, value in self._raw.items() if isinstance(value, dict)]

    def lists_of_strings(self, key: str) -> list[list[str]]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
            raise self.refuse(key, "must be a list of lists of strings")
        if not all(isinstance(word, str) for item in value for word in item):
            raise self.refuse(key, "must be a list of lists of strings")
        return value

    def inner_string(self, key: str, inner: str) -> str | None:
        """The string `inner` within the object `key`; None if either is absent or no such type."""
        value = self._raw.get(key)
        text = value.get(inner) if isinstance(value, dict) else None
        return text if isinstance(text, str) else None

    def is_empty(self, key: str) -> bool:
        """True if the key is absent, null or an object without keys."""
        return self._raw.get(key) in (None, {})

    def refuse(self, key: str, rule: str) -> ConfigError:
        """The error for a present value that is not supported; the caller raises it."""
        return ConfigError(f"{self._where}: {key} {rule}, got {shown(self._raw.get(key))}")

    def _get(self, key: str, default: Any, is_nullable: bool = False) -> Any:
        value = self._raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self._where}: {key} is missing")
        return None if key in self._raw and not is_nullable else default


def shown(value: Any) -> str:
    """A value of the file for a message: as JSON, cut to MAX_SHOWN_CHARS."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
