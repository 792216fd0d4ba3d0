"""Typed access to one JSON object of a model: every refusal names the key, the value, the limit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pyserve.errors import ConfigError

MAX_SHOWN_CHARS = 80  # of a refused value


class Fields:
    """Reads keys of `raw`. A key whose value is null counts as absent, as in transformers.

    `where` is how messages call the object, e.g. "config.json". Raises ConfigError.
    """

    __slots__ = ("_raw", "_where")

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def is_null(self, key: str) -> bool:
        """True where the key is there and says null, which is not the same as absent to some."""
        return key in self._raw and self._raw[key] is None

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, f"must be an integer in [{low}, {high}]")
        return value

    def number(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self._get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise self.refuse(key, f"must be a number in [{low:g}, {high:g}]")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def string(self, key: str, *, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "must be a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(key, "must be a list of strings")
        return value

    def table(self, key: str) -> Fields:
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self.refuse(key, "must be an object")
        return Fields(value, f"{self._where}: {key}")

    def tables(self) -> list[str]:
        """Keys whose values are objects."""
        return [key for key, value in self._raw.items() if isinstance(value, dict)]

    def refuse(self, key: str, rule: str) -> ConfigError:
        """The error for a value that is there but cannot be served; the caller raises it."""
        shown = json.dumps(self._raw.get(key))
        if len(shown) > MAX_SHOWN_CHARS:
            shown = shown[:MAX_SHOWN_CHARS] + "..."
        return ConfigError(f"{self._where}: {key} {rule}, got {shown}")

    def _get(self, key: str, default: Any) -> Any:
        value = self._raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self._where}: {key} is missing")
        return default
