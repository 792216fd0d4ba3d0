"""References within a JSON Schema -> JSON pointers.

The whole schema of a request is one resource: a subschema with an `$id` of its own would be
another, and no reference may lead to it or through it. With a single resource a dynamic or
recursive reference leads to the same place as a plain one, because only one schema can have its
anchor.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")

_WITHIN = frozenset(
    "additionalItems additionalProperties allOf anyOf contains else if items not oneOf prefixItems "
    "propertyNames then unevaluatedItems unevaluatedProperties".split()
)
_BY_NAME = frozenset(
    "$defs definitions dependencies dependentSchemas patternProperties properties".split()
)


class LostReferenceError(ValueError):
    """A reference that cannot be resolved, and why."""


class References:
    """The references of one schema, `root`."""

    def __init__(self, root: object) -> None:
        self._root = root
        # Anchor -> pointer; None if several schemas have it.
        self._anchors: dict[str, str | None] | None = None

    def pointer(self, reference: str) -> str:
        """The JSON pointer, for `at`, that a reference leads to. Raises LostReferenceError."""
        shown = f'"{reference[:61]}"'
        root_id = self._root.get("$id") if isinstance(self._root, dict) else None
        if isinstance(root_id, str) and root_id and reference.startswith(root_id):
            reference = reference.removeprefix(root_id) or "#"
        if not reference.startswith("#"):
            raise LostReferenceError(
                f"must point into this schema as #/$defs/name or #anchor, got {shown}"
            )
        pointer = unquote(reference[1:])
        if pointer and not pointer.startswith("/"):
            return self._pointer_of_anchor(pointer, shown)
        pointer = pointer.removesuffix("/") if pointer == "/" else pointer
        try:
            self.at(pointer)
        except (LookupError, ValueError):
            raise LostReferenceError(f"there is nothing at {shown}") from None
        return pointer

    def at(self, pointer: str) -> Any:
        """The value that a JSON pointer leads to. Raises LookupError or ValueError if there is
        none.
        """
        value = self._root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if value is not self._root and has_own_id(value):
                raise LookupError(part)
            if isinstance(value, list) and part.isdecimal():
                value = value[int(part)]
            elif isinstance(value, dict):
                value = value[part]
            else:
                raise LookupError(part)
        return value

    def _pointer_of_anchor(self, name: str, shown: str) -> str:
        if self._anchors is None:
            self._anchors = _anchors_in(self._root)
        if name not in self._anchors:
            raise LostReferenceError(f"no schema in this one has the anchor {shown}")
        pointer = self._anchors[name]
        if pointer is None:
            raise LostReferenceError(f"several schemas have the anchor {shown}")
        return pointer


def has_own_id(schema: object) -> bool:
    """Whether a subschema is a resource of its own. An $id like "#name" is an anchor of
    old drafts.
    """
    own = schema.get("$id") if isinstance(schema, dict) else None
    return isinstance(own, str) and not own.startswith("#")


def escaped(name: str) -> str:
    """A property name as one part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _anchors_in(root: object) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    stack = [("", root)]
    while stack:
        pointer, value = stack.pop()
        if isinstance(value, list):
            stack += [(f"{pointer}/{index}", item) for index, item in enumerate(value)]
        if not isinstance(value, dict) or pointer and has_own_id(value):
            continue
        for name in _anchors_of(value):
            found[name] = None if name in found else pointer
        for keyword, inner in value.items():
            if keyword in _WITHIN:
                stack.append((f"{pointer}/{keyword}", inner))
            elif keyword in _BY_NAME and isinstance(inner, dict):
                place = f"{pointer}/{keyword}"
                stack += [(f"{place}/{escaped(name)}", schema) for name, schema in inner.items()]
    return found


def _anchors_of(schema: dict[str, Any]) -> set[str]:
    names = [schema.get("$anchor"), schema.get("$dynamicAnchor")]
    names += [own[1:] for own in (schema.get("$id"), schema.get("id"))
              if isinstance(own, str) and own.startswith("#")]  # fmt: skip
    return {name for name in names if isinstance(name, str) and name}
