"""JSON Schemas of requests -> schemas that the grammar engine enforces exactly.

The engine, llguidance, reads most of draft 2020-12. It refuses much of what it cannot enforce, but
not all, and does not say where in the schema the fault is. So each schema is walked here first and
written anew: references point to numbered definitions, annotations are dropped, keywords of older
drafts become today's, patterns are in the engine's syntax. A keyword that cannot be enforced is an
error that names its JSON pointer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NoReturn

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar_analysis import can_end, check_cost
from pyserve.text.grammar_conditions import both, containing, opposites
from pyserve.text.grammar_errors import part_of_pointer, shown
from pyserve.text.grammar_formats import FORMATS, format_schema
from pyserve.text.grammar_numbers import CONTAINS_COUNTS, MAX_EXACT, NUMERIC, NumberError
from pyserve.text.grammar_pattern import PatternError, engine_pattern, without_lookaheads
from pyserve.text.grammar_references import (
    REFERENCES,
    LostReferenceError,
    References,
    has_own_id,
)
from pyserve.text.grammar_rewrites import (
    MAX_DEPENDENT,
    NOTES,
    RewriteError,
    allows_nothing,
    rewritten,
    without,
)

MAX_DEPTH = 56  # nesting of schemas; each takes two levels of JSON, and the engine reads 127
MAX_SCHEMAS = 10_000  # in one schema; a definition counts once, and again where a oneOf inlines it
MAX_DEFINITIONS = 1000
MAX_VALUES = 20_000  # of all enums together
MAX_PROPERTIES = 2000  # of one object, with the required ones; compile time is quadratic in them
MAX_OPTIONAL = 400  # optional properties of one object; the engine's parser keeps 5 states for each
MAX_PATTERNS = 12  # patterns in one patternProperties
MAX_SEARCH_S = 0.5  # time to search for the part of a schema that the engine refuses
MAX_POINTER_CHARS = 500  # length of a pointer in an error

Schema = dict[str, Any]

TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
# Keywords of JSON Schema, in any draft, that are refused.
NOT_ENFORCED = frozenset(("extends", "disallow", "divisibleBy"))
OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07", "2019-09")


def engine_schema(
    schema: object, *, param: str, place: str = "", has_additional_properties: bool = True
) -> Schema | bool:
    """The schema that the engine is given for a client's schema. Raises InvalidRequestError for
    `param`.

    place                      where in the field `param` the schema is, for the error.
    has_additional_properties  whether objects whose schema does not say so may have properties that
                               it does not name.
    """
    return _Walk(schema, param, place, has_additional_properties).run()


def offending_pointer(schema: object, error: str, compile: Callable[[Schema], str]) -> str:
    """The JSON pointer of what makes the engine refuse a schema with `error`; "" if it is not
    found.

    compile  returns the engine's error for a schema made by engine_schema, "" if it has none.

    It is the innermost schema that fails with this error on its own, or its keyword if that fails
    so.
    """
    walk = _Walk(schema, "", "", True)
    walk.run()
    definitions = walk.definitions
    until_s = time.monotonic() + MAX_SEARCH_S
    for pointer, written, names in walk.innermost_first():
        if time.monotonic() > until_s:
            break
        if _first_line(compile({**written, "$defs": definitions})) != _first_line(error):
            continue
        for name, value in written.items():
            alone = {"type": written["type"]} if "type" in written else {}
            said = compile({**alone, name: value, "$defs": definitions})
            if name in names and _first_line(said) == _first_line(error):
                return f"{pointer}/{part_of_pointer(name)}"
        return pointer
    return ""


class _Walk:
    """The walk through one schema. A JSON pointer names a place in it; "" is the whole schema."""

    def __init__(
        self, root: object, param: str, place: str, has_additional_properties: bool
    ) -> None:
        self._root = root
        self._references = References(root)
        self._place = place
        self._has_additional_properties = has_additional_properties
        self._param = param
        self._num_schemas = 0
        self._num_values = 0
        self._names: dict[str, str] = {}  # pointer of a definition -> its name in the result
        self._pointers: list[str] = []  # of each definition; its index is its name in the result
        self._num_walked = 0  # how many definitions have been walked
        self.definitions: dict[str, Schema | bool] = {}
        # (pointer, rewritten schema, original keywords) of each schema, inner ones before outer
        # ones.
        self._nodes: list[tuple[str, Schema, Collection[str]]] = []
        self._starts = [0]  # index in _nodes where the root's nodes begin, then each definition's
        is_old = isinstance(root, dict) and any(
            draft in str(root.get("$schema", "")) for draft in OLD_DRAFTS
        )
        self._has_prefix_items = not is_old

    def run(self) -> Schema | bool:
        root = self._schema(self._root, "", 0)
        while self._num_walked < len(self._pointers):
            pointer = self._pointers[self._num_walked]
            self._starts.append(len(self._nodes))
            schema = self._references.at(pointer)
            self.definitions[str(self._num_walked)] = self._schema(schema, pointer, 0)
            self._num_walked += 1
        if not isinstance(root, dict):
            if not root:
                self._refuse("", "false allows nothing")
            return root
        check_cost(root, self.definitions, self._refuse)
        if not can_end(root, self.definitions):
            self._refuse("", "no finite value is valid: what it needs is false, or holds itself")
        return {**root, "$defs": self.definitions} if self.definitions else root

    def innermost_first(self) -> Iterator[tuple[str, Schema, Collection[str]]]:
        """The entries of `_nodes`: those of the last definition first, those of the root last."""
        for start, end in reversed(list(zip(self._starts, [*self._starts[1:], None], strict=True))):
            yield from self._nodes[start:end]

    def _refuse(self, pointer: str, reason: str) -> NoReturn:
        if len(pointer) > MAX_POINTER_CHARS:
            pointer = f"{pointer[: MAX_POINTER_CHARS // 2]}...{pointer[-MAX_POINTER_CHARS // 2 :]}"
        where = f" at {pointer}" if pointer else ""
        raise InvalidRequestError(f"{self._param}{self._place}{where}: {reason}", self._param)

    def _schema(
        self, schema: object, pointer: str, depth: int, around: tuple[Schema, ...] = ()
    ) -> Schema | bool:
        """Rewrite one schema. around: the enclosing schemas that apply to the same value."""
        if isinstance(schema, bool):
            return schema
        if isinstance(schema, dict) and allows_nothing(schema):
            return False
        if not isinstance(schema, dict):
            self._refuse(pointer, f"a schema must be an object or a boolean, got {shown(schema)}")
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            self._refuse(pointer, f"there are more than {MAX_SCHEMAS} schemas in this one")
        if depth > MAX_DEPTH:
            self._refuse(pointer, f"schemas are nested deeper than {MAX_DEPTH}")
        result: Schema = {}
        for keyword in schema:
            place = f"{pointer}/{part_of_pointer(keyword)}"
            read = _KEYWORDS.get(keyword)
            if read is not None:
                self._depth, self._around = depth, (*around, schema)
                for name, new in read(self, schema, keyword, place).items():
                    if name == "allOf" and name in result:
                        new = [*result[name], *new]
                    result[name] = new
            elif keyword in NOT_ENFORCED:
                self._refuse(place, f"{keyword} cannot be enforced, leave it out")
            elif keyword == "$id" and pointer and has_own_id(schema):
                self._refuse(place, "only the outermost schema may have an id of its own")
        if "properties" in result and not self._has_additional_properties:
            result.setdefault("additionalProperties", False)
        result = self._rewritten(schema, result, pointer)
        self._nodes.append((pointer, result, schema.keys()))
        return result

    def _rewritten(self, schema: Schema, result: Schema, pointer: str) -> Schema:
        def read_pattern(pattern: object, keyword: str) -> str:
            return self._read_pattern(pattern, f"{pointer}/{keyword}")

        follow = partial(self._follow, pointer)
        try:
            new = rewritten(schema, result, follow=follow, read_pattern=read_pattern)
        except RewriteError as error:
            self._refuse(f"{pointer}/{error.keyword}", str(error))
        if "enum" in new and "enum" not in result:
            self._count_values(sum(map(len, new["enum"])), pointer)
        return new

    def _follow(self, pointer: str, schema: object) -> object:
        """The schema that a chain of plain references leads to; any other schema as it is."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or schema.keys() - NOTES != {"$ref"}:
                break
            number = int(self._definition(schema["$ref"], pointer))
            schema = self._references.at(self._pointers[number])
        return schema

    def _inside(
        self, schema: object, place: str, depth: int, around: tuple[Schema, ...] = ()
    ) -> Schema | bool:
        return self._schema(schema, place, depth + 1, around)

    # Each of these methods reads one keyword of `schema` and returns what replaces it.

    def _ref(self, schema: Schema, keyword: str, place: str) -> Schema:
        found = {"$ref": "#/$defs/" + self._definition(schema[keyword], place)}
        return {"allOf": [found]} if len(schema.keys() & set(REFERENCES)) > 1 else found

    def _definition(self, reference: object, place: str) -> str:
        """The name that the result has for the definition a reference leads to."""
        if not isinstance(reference, str):
            self._refuse(place, f"must be a string, got {shown(reference)}")
        try:
            pointer = self._references.pointer(reference)
        except LostReferenceError as error:
            self._refuse(place, str(error))
        if pointer not in self._names:
            if len(self._names) >= MAX_DEFINITIONS:
                self._refuse(place, f"there are more than {MAX_DEFINITIONS} definitions in use")
            self._names[pointer] = str(len(self._names))
            self._pointers.append(pointer)
        return self._names[pointer]

    def _type(self, schema: Schema, keyword: str, place: str) -> Schema:
        value = schema[keyword]
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not TYPES.issuperset(
            name if isinstance(name, str) else "" for name in names
        ):  # fmt: skip
            self._refuse(
                place, f"must be one or several of {', '.join(sorted(TYPES))}, got {shown(value)}"
            )
        return {"type": value}

    def _enum(self, schema: Schema, keyword: str, place: str) -> Schema:
        values = schema[keyword]
        if not isinstance(values, list) or not values:
            self._refuse(place, f"must be a list of values, got {shown(values)}")
        self._count_values(len(values), place)
        for value in values:
            self._check_value(value, place, 0)
        return {"enum": values}

    def _count_values(self, number: int, place: str) -> None:
        self._num_values += number
        if self._num_values > MAX_VALUES:
            self._refuse(place, f"all enums together have more than {MAX_VALUES} values")

    def _const(self, schema: Schema, keyword: str, place: str) -> Schema:
        self._check_value(schema[keyword], place, 0)
        return {"const": schema[keyword]}

    def _check_value(self, value: object, place: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._refuse(place, f"is nested deeper than {MAX_DEPTH}")
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                self._check_value(item, place, depth + 1)
        elif isinstance(value, int | float) and not abs(value) <= MAX_EXACT:
            self._refuse(place, f"numbers must be within 2**53, got {shown(value)}")

    def _named(self, schema: Schema, keyword: str, place: str) -> Schema:
        named = schema[keyword]
        if not isinstance(named, dict):
            self._refuse(place, f"must be an object of schemas, got {shown(named)}")
        depth, result = self._depth, {}
        for name, inner in named.items():
            inner_place = f"{place}/{part_of_pointer(name)}"
            if keyword == "patternProperties":
                name = self._read_pattern(name, inner_place)
            result[name] = self._inside(inner, inner_place, depth)
        if keyword == "properties":
            self._check_number_of_properties(named, place)
            needed = _names_in(schema.get("required"))
            num_optional = len(named.keys() - needed)
            if num_optional > MAX_OPTIONAL:
                self._refuse(place, f"has {num_optional} properties that are not required, the "
                                    f"limit is {MAX_OPTIONAL}")  # fmt: skip
        elif len(result) > MAX_PATTERNS:
            self._refuse(place, f"has {len(result)} patterns, the limit is {MAX_PATTERNS}")
        return {keyword: result}

    def _inner(self, schema: Schema, keyword: str, place: str) -> Schema:
        return {keyword: self._inside(schema[keyword], place, self._depth)}

    def _items(self, schema: Schema, keyword: str, place: str) -> Schema:
        depth = self._depth
        if not isinstance(schema[keyword], list):
            return self._inner(schema, keyword, place)
        result = self._list(schema[keyword], place, "prefixItems")
        if "additionalItems" in schema:  # older drafts' keyword for the items behind such a list
            place = place.removesuffix("items") + "additionalItems"
            result["items"] = self._inside(schema["additionalItems"], place, depth)
        return result

    def _prefix_items(self, schema: Schema, keyword: str, place: str) -> Schema:
        if not self._has_prefix_items or isinstance(schema.get("items"), list):
            self._refuse(place, "prefixItems is not a word of this schema's draft; use items")
        if schema[keyword] == []:
            return {}
        return self._list(schema[keyword], place, keyword)

    def _several(self, schema: Schema, keyword: str, place: str) -> Schema:
        depth = self._depth
        result = self._list(schema[keyword], place, keyword, self._around)
        if keyword == "oneOf":  # only inlined branches can be proven to exclude each other
            result[keyword] = [self._inlined(branch, place, depth) for branch in result[keyword]]
        return result

    def _inlined(self, branch: Schema | bool, place: str, depth: int) -> Schema | bool:
        """A branch of a oneOf; if it is a reference, the schema that it leads to."""
        num_followed = 0
        while isinstance(branch, dict) and branch.keys() == {"$ref"}:
            number = int(branch["$ref"].rpartition("/")[2])
            num_followed += 1
            if num_followed > MAX_DEPTH:
                break
            branch = self._inside(self._references.at(self._pointers[number]), place, depth)
        return branch

    def _list(
        self, value: object, place: str, keyword: str, around: tuple[Schema, ...] = ()
    ) -> Schema:
        if not isinstance(value, list) or not value:
            self._refuse(place, f"must be a list of schemas, got {shown(value)}")
        depth = self._depth
        return {
            keyword: [
                self._inside(inner, f"{place}/{index}", depth, around)
                for index, inner in enumerate(value)
            ]
        }

    def _if(self, schema: Schema, keyword: str, place: str) -> Schema:
        """Either `if` and `then` hold, or the opposite of `if` holds together with `else`."""
        if not {"then", "else"} & schema.keys():
            return {}
        depth, around, parent = self._depth, self._around, place.removesuffix("/if")
        try:
            others = opposites(schema["if"], around, partial(self._follow, place))
        except RewriteError as error:
            self._refuse(place, str(error))

        def read(inner: object, name: str) -> Schema | bool:
            return self._inside(inner, f"{parent}/{name}", depth, around)

        choices = [both(read(schema["if"], "if"), read(schema.get("then", True), "then"))]
        if others:
            other: Schema = {"anyOf": [read(one, "if") for one in others]}
            choices.append(both(other, read(schema.get("else", True), "else")))
        possible = [choice for choice in choices if choice is not False]
        return {"allOf": [{"anyOf": possible} if possible else False]}

    def _dependent(self, schema: Schema, keyword: str, place: str) -> Schema:
        """If a property is present, its schema holds. Lists of names are left to `rewritten`."""
        depth, around, found = self._depth, self._around, []
        for name, needed in schema[keyword].items() if isinstance(schema[keyword], dict) else ():
            if isinstance(needed, list):
                continue
            inner_place = f"{place}/{part_of_pointer(name)}"
            inner = both({"required": [name]}, self._inside(needed, inner_place, depth, around))
            if inner != {"required": [name]}:
                missing = without(name)
                found.append(missing if inner is False else {"anyOf": [missing, inner]})
        if found and (len(found) > MAX_DEPENDENT or schema.get("type") != "object"):
            self._refuse(
                place, f"{keyword} cannot be enforced but in a schema with the type object, for "
                f"{MAX_DEPENDENT} properties at most: leave it out"
            )  # fmt: skip
        return {"allOf": found} if found else {}

    def _contains(self, schema: Schema, keyword: str, place: str) -> Schema:
        """At least minContains items are valid by the schema, by default one. Older drafts have
        neither minContains nor maxContains.
        """
        inner = self._inside(schema[keyword], place, self._depth)
        asked = {name: self._numeric(schema, name, place.removesuffix(keyword) + name)[name]
                 for name in CONTAINS_COUNTS if name in schema}  # fmt: skip
        least = asked.get("minContains", 1)
        if not self._has_prefix_items:
            least = max(least, 1)
        try:
            found = containing(inner, schema, least=least, most=asked.get("maxContains"))
        except RewriteError as error:
            self._refuse(place.removesuffix(keyword) + error.keyword, str(error))
        return {"allOf": found} if found else {}

    def _required(self, schema: Schema, keyword: str, place: str) -> Schema:
        value = schema[keyword]
        if not isinstance(value, list) or len(_names_in(value)) < len(value):
            self._refuse(place, f"must be a list of different names, got {shown(value)}")
        self._check_number_of_properties(value, place)
        return {keyword: value}

    def _check_number_of_properties(self, names: Collection[str], place: str) -> None:
        if len(names) > MAX_PROPERTIES:
            self._refuse(place, f"has {len(names)} properties, the limit is {MAX_PROPERTIES}")

    def _read_pattern(self, pattern: object, place: str) -> str:
        if not isinstance(pattern, str):
            self._refuse(place, f"must be a string, got {shown(pattern)}")
        try:
            return engine_pattern(pattern)
        except PatternError as error:
            self._refuse(place, str(error))

    def _pattern(self, schema: Schema, keyword: str, place: str) -> Schema:
        pattern = schema[keyword]
        parts = without_lookaheads(pattern) if isinstance(pattern, str) else [pattern]
        own, *others = [self._read_pattern(part, place) for part in parts]
        return {
            keyword: own,
            **({"allOf": [{keyword: other} for other in others]} if others else {}),
        }

    def _format(self, schema: Schema, keyword: str, place: str) -> Schema:
        """Formats only restrict strings. For other types they are annotations, such as OpenAPI's
        int32.
        """
        name = schema[keyword]
        types = schema.get("type")
        if isinstance(types, str | list) and types != "string" and "string" not in types:
            return {}
        found = format_schema(name, schema)
        if found is None:
            self._refuse(
                place, f"must be one of {', '.join(sorted(FORMATS))}, got {shown(name)}; leave it "
                "out, or write a pattern"
            )  # fmt: skip
        return found

    def _numeric(self, schema: Schema, keyword: str, place: str) -> Schema:
        try:
            return NUMERIC[keyword](schema, keyword)
        except NumberError as error:
            self._refuse(place, str(error))

    def _min_properties(self, schema: Schema, keyword: str, place: str) -> Schema:
        """Enforced only up to 1, or where `required` implies it: the engine counts a repeated name
        as two properties.
        """
        result = self._numeric(schema, keyword, place)
        if result[keyword] <= len(_names_in(schema.get("required"))):
            return {}
        if result[keyword] > 1:
            self._refuse(
                place, "beyond the number of required properties, minProperties above 1 cannot be "
                "enforced"
            )  # fmt: skip
        return result


# Functions of the class, not bound methods: a _Walk holding its own bound methods would be a
# reference cycle, which keeps the schema in memory until the garbage collector runs.
_KEYWORDS: dict[str, Callable[[_Walk, Schema, str, str], Schema]] = {
    **dict.fromkeys(REFERENCES, _Walk._ref),
    "if": _Walk._if,
    **dict.fromkeys(("dependentSchemas", "dependencies"), _Walk._dependent),
    "contains": _Walk._contains,
    "type": _Walk._type,
    "enum": _Walk._enum,
    "const": _Walk._const,
    "properties": _Walk._named,
    "patternProperties": _Walk._named,
    "additionalProperties": _Walk._inner,
    "items": _Walk._items,
    "prefixItems": _Walk._prefix_items,
    "required": _Walk._required,
    "pattern": _Walk._pattern,
    "format": _Walk._format,
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _Walk._several),
    **dict.fromkeys(NUMERIC.keys() - CONTAINS_COUNTS, _Walk._numeric),
    "minProperties": _Walk._min_properties,
}


def _first_line(error: str) -> str:
    return error.partition("\n")[0]


def _names_in(required: object) -> set[str]:
    """The names that `required` lists; the empty set if it is not a list."""
    if not isinstance(required, list):
        return set()
    return {name for name in required if isinstance(name, str)}
