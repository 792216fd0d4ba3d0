"""Structural tags -> Lark: free text in which a trigger starts something structured.

A format is a JSON object with a type. The types and their fields are those that vLLM takes in
response_format and structured_outputs, except `arguments`, which is our own:

    const_string         value
    json_schema          json_schema
    arguments            form, json_schema: an object as tool_parsers/arguments.py writes it
    regex                pattern
    any_text             no field; text that ends where what follows it begins
    sequence, or         elements
    tag                  begin, content, end
    triggered_tags       triggers, tags; at_least_one, stop_after_first
    tags_with_separator  tags, separator; at_least_one, stop_after_first

The older form {"structures": [{begin, schema, end}], "triggers": [...]} means triggered_tags. Where
begin, end, a trigger or a value spells a special token of the model, it means that token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar_json import WHITESPACE, schema_text
from pyserve.text.grammar_pattern import PatternError, engine_pattern
from pyserve.text.grammar_schema import engine_schema
from pyserve.text.tool_parsers.arguments import Member, UnsayableError, members_of
from pyserve.text.tool_parsers.tagged_values import END_VALUE

MAX_FORMATS = 500
MAX_DEPTH = 16
MAX_TEXT_CHARS = 1000  # of begin, end, a trigger, a separator or a value
MAX_SCHEMA_CHARS = 2**21  # of all schemas together, each with the definitions that it uses

_OF_TAGS = frozenset(("at_least_one", "stop_after_first"))
_FIELDS: Mapping[str, frozenset[str]] = {  # type of format -> its fields beside type
    "const_string": frozenset(("value",)),
    "json_schema": frozenset(("json_schema",)),
    "arguments": frozenset(("form", "json_schema")),
    "regex": frozenset(("pattern",)),
    "any_text": frozenset(),
    "sequence": frozenset(("elements",)),
    "or": frozenset(("elements",)),
    "tag": frozenset(("begin", "content", "end")),
    "triggered_tags": frozenset(("triggers", "tags")) | _OF_TAGS,
    "tags_with_separator": frozenset(("tags", "separator")) | _OF_TAGS,
}
_NEW, _OLD = frozenset(("format",)), frozenset(("structures", "triggers"))
_STRUCTURE = frozenset(("begin", "schema", "end"))

Format = dict[str, Any]


def tags_to_lark(
    tags: Format, *, special_tokens: Mapping[str, int], param: str, whitespace: str = WHITESPACE
) -> str:
    """The Lark grammar of a format, or of the older form. Raises InvalidRequestError for `param`.

    special_tokens  string of each special token of the model -> its id.
    whitespace      a pattern for the white space between JSON tokens, as in schema_text.
    """
    return _Writer(special_tokens, param, whitespace).write(tags)


class _Writer:
    """Writes a format as Lark rules, collected in `_rules`. A method `_name` for each type of
    format returns the Lark expression for it; `place` is the JSON pointer of the format, for
    errors.
    """

    def __init__(self, special_tokens: Mapping[str, int], param: str, whitespace: str) -> None:
        self._special_tokens = special_tokens
        names = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._param = param
        self._whitespace = whitespace
        self._rules: list[str] = []
        self._num_formats = 0
        self._num_chars = 0
        self._json_rules: dict[str, str] = {}  # text of a schema -> the name of its rule

    def write(self, tags: Format) -> str:
        if "structures" in tags:
            self._check_names(tags, _OLD, "")
            tags, place = self._from_old(tags), ""
        elif "format" in tags:
            self._check_names(tags, _NEW, "")
            tags, place = tags["format"], "/format"
        else:
            place = ""
        start = self._format(tags, place, 0)
        return "\n".join(
            ["%llguidance {}", f"start: {start}", *self._rules, r"TEXT: /(.|\n)*/", ""]
        )

    def _from_old(self, tags: Format) -> Format:
        structures = self._objects(tags, "structures", "")
        for index, structure in enumerate(structures):
            self._check_names(structure, _STRUCTURE, f"/structures/{index}")
        return {
            "type": "triggered_tags",
            "triggers": tags.get("triggers"),
            "tags": [
                {
                    "begin": structure.get("begin"),
                    "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
                    "end": structure.get("end"),
                }
                for structure in structures
            ],
        }

    def _refuse(self, place: str, reason: str) -> InvalidRequestError:
        where = f" at {place}" if place else ""
        return InvalidRequestError(f"{self._param}{where}: {reason}", self._param)

    def _format(self, format_: object, place: str, depth: int) -> str:
        if not isinstance(format_, dict):
            raise self._refuse(place, "must be an object with a type")
        self._num_formats += 1
        if depth > MAX_DEPTH or self._num_formats > MAX_FORMATS:
            raise self._refuse(
                place, f"there are more than {MAX_FORMATS} formats, or {MAX_DEPTH} within another"
            )
        kind = format_.get("type")
        writer = _WRITERS.get(kind) if isinstance(kind, str) else None
        if writer is None:
            raise self._refuse(
                f"{place}/type", f"must be one of {', '.join(_WRITERS)}, got {kind!r:.60}"
            )
        assert isinstance(kind, str)
        self._check_names(format_, _FIELDS[kind], place)
        return writer(self, format_, place, depth)

    def _check_names(self, given: Format, known: frozenset[str], place: str) -> None:
        """Refuse unknown fields: one of them may be a restriction that would not be enforced."""
        for name in given:
            if name != "type" and name not in known:
                raise self._refuse(
                    place, f"there may be {', '.join(sorted(known)) or 'no field'} here beside "
                    f"type, got {name:.40}"
                )  # fmt: skip

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _string(self, format_: Format, name: str, place: str) -> str:
        value = format_.get(name)
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
            raise self._refuse(
                f"{place}/{name}", f"must be a text of at most {MAX_TEXT_CHARS} characters"
            )
        return value

    def _is_so(self, format_: Format, name: str, place: str) -> bool:
        value = format_.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._refuse(f"{place}/{name}", f"must be true or false, got {value!r:.60}")
        return bool(value)

    def _objects(self, format_: Format, name: str, place: str) -> list[Any]:
        value = format_.get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_FORMATS:
            raise self._refuse(
                f"{place}/{name}", f"must be a list of 1 to {MAX_FORMATS}, got {value!r:.60}"
            )
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise self._refuse(f"{place}/{name}/{index}", "must be an object")
        return value

    def _literal(self, text: str) -> str:
        """The Lark expression for a text, with token ids where the text spells special tokens."""
        parts, start = [], 0
        for match in self._special.finditer(text):
            if match.start() > start:
                parts.append(json.dumps(text[start : match.start()]))
            parts.append(f"<[{self._special_tokens[match[0]]}]>")
            start = match.end()
        if start < len(text):
            parts.append(json.dumps(text[start:]))
        return " ".join(parts) or '""'

    def _const(self, format_: Format, place: str, depth: int) -> str:
        return self._literal(self._string(format_, "value", place))

    def _json_schema(self, format_: Format, place: str, depth: int) -> str:
        return self._json(format_.get("json_schema", True), place)

    def _json(self, schema: object, place: str) -> str:
        checked = engine_schema(schema, param=self._param, place=f" at {place}/json_schema")
        text = schema_text(checked, self._whitespace)
        self._num_chars += len(text)
        if self._num_chars > MAX_SCHEMA_CHARS:
            raise self._refuse(
                place, f"all schemas, each with the definitions that it uses, take more than "
                f"{MAX_SCHEMA_CHARS} characters"
            )  # fmt: skip
        if text not in self._json_rules:
            self._json_rules[text] = self._rule(f"%json {text}")
        return self._json_rules[text]

    def _arguments(self, format_: Format, place: str, depth: int) -> str:
        schema, form = format_.get("json_schema"), format_.get("form")
        if form not in ("python", "tags") or not isinstance(schema, dict):
            raise self._refuse(place, "must have the form python or tags, and a json_schema")
        try:
            members = members_of(form, schema)
        except UnsayableError as error:
            raise self._refuse(f"{place}/json_schema", str(error)) from None
        if form == "python":
            return self._python_arguments(members, place)
        if members is None:
            name, value = self._rule(r"/[^<>\n]{1,64}/"), self._bare_text()
            return self._rule(f'("<parameter=" {name} ">" {value} "\\n")*')
        tagged = [self._tagged(member, place) for member in members]
        return self._rule(" ".join(tagged) or '""')

    def _python_arguments(self, members: list[Member] | None, place: str) -> str:
        """Arguments with commas only between those that are present. Built from the last member to
        the first: `first` matches the remaining members if none has been written yet, `rest` if
        some have.
        """
        if members is None:
            one = self._rule(f"/[A-Za-z_][A-Za-z0-9_]{{0,63}}=/ {self._json(True, place)}")
            return self._rule(f'({one} (", " {one})*)?')
        first = rest = '""'
        for member in reversed(members):
            one = f"{self._literal(member.name + '=')} {self._json(member.schema, place)} {rest}"
            first = self._rule(one if member.is_needed else f"{one} | {first}")
            rest = self._rule(f'", " {one}' if member.is_needed else f'", " {one} | {rest}')
        return first

    def _tagged(self, member: Member, place: str) -> str:
        begin = self._literal(f"<parameter={member.name}>\n")
        if member.is_text:
            body = f'{self._bare_text()} "\\n"'
        else:
            texts = " | ".join(self._literal(text + "\n") for text in member.texts)
            value = f"({texts})" if texts else f'{self._json(member.schema, place)} "\\n"'
            body = f"{value} {self._literal(END_VALUE + chr(10))}"
        rule = self._rule(f"{begin} {body}")
        return rule if member.is_needed else f"{rule}?"

    def _bare_text(self) -> str:
        """Any text up to and including the first END_VALUE."""
        return self._rule(f"TEXT {self._literal(END_VALUE)}", "[lazy]")

    def _regex(self, format_: Format, place: str, depth: int) -> str:
        try:
            pattern = engine_pattern(self._string(format_, "pattern", place))
        except PatternError as error:
            raise self._refuse(f"{place}/pattern", str(error)) from None
        pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n")
        return self._rule(f"/{pattern}/")

    def _any_text(self, format_: Format, place: str, depth: int) -> str:
        return "TEXT"

    def _sequence(self, format_: Format, place: str, depth: int) -> str:
        elements = self._objects(format_, "elements", place)
        return "(" + " ".join(self._each(elements, f"{place}/elements", depth)) + ")"

    def _or(self, format_: Format, place: str, depth: int) -> str:
        elements = self._objects(format_, "elements", place)
        return "(" + " | ".join(self._each(elements, f"{place}/elements", depth)) + ")"

    def _each(self, elements: list[Any], place: str, depth: int) -> list[str]:
        return [
            self._format(item, f"{place}/{index}", depth + 1) for index, item in enumerate(elements)
        ]

    def _tag(self, format_: Format, place: str, depth: int, begun: str = "") -> str:
        """A tag, without the part of its begin that has been written already, `begun`."""
        self._check_names(format_, _FIELDS["tag"], place)
        if format_.get("type", "tag") != "tag":
            raise self._refuse(f"{place}/type", f"must be tag, got {format_['type']!r:.60}")
        begin = self._string(format_, "begin", place).removeprefix(begun)
        end = self._string(format_, "end", place)
        content = format_.get("content")
        before = self._literal(begin) if begin else ""
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            plain = self._special.search(end)
            if plain is None:  # the text ends with the first `end` in it
                lazy = self._rule(f"TEXT {self._literal(end)}", "[lazy]")
                return self._rule(f"{before} {lazy}")
        inner = self._format(content, f"{place}/content", depth + 1)
        after = self._literal(end) if end else ""
        return self._rule(f"{before} {inner} {after}")

    def _triggered(self, format_: Format, place: str, depth: int) -> str:
        tags = self._objects(format_, "tags", place)
        triggers = format_.get("triggers")
        if not isinstance(triggers, list) or not 1 <= len(triggers) <= MAX_FORMATS or not all(
            isinstance(trigger, str) and 0 < len(trigger) <= MAX_TEXT_CHARS for trigger in triggers
        ):  # fmt: skip
            raise self._refuse(f"{place}/triggers", "must be a list of texts, none of them empty")
        groups: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for index, tag in enumerate(tags):
            tag_place = f"{place}/tags/{index}"
            begin = self._string(tag, "begin", tag_place)
            matching = [trigger for trigger in triggers if begin.startswith(trigger)]
            if len(matching) != 1:
                raise self._refuse(
                    f"{tag_place}/begin", f"must begin with one of the triggers, got {begin!r:.60}"
                )
            groups[matching[0]].append(self._tag(tag, tag_place, depth + 1, begun=matching[0]))
        bodies = [self._group(trigger, tags) for trigger, tags in groups.items() if tags]
        any_group = "(" + " | ".join(bodies) + ")"
        is_needed = self._is_so(format_, "at_least_one", place)
        if self._is_so(format_, "stop_after_first", place):
            return any_group if is_needed else f"({any_group} | TEXT)"
        return f"({any_group}{'+' if is_needed else '*'} TEXT)"

    def _group(self, trigger: str, tags: list[str]) -> str:
        """Text up to a trigger, then what follows the trigger in one of the tags that begin with
        it.
        """
        special = self._special.search(trigger)
        if special is None:
            head = self._rule(f"TEXT {self._literal(trigger)}", "[lazy]")
        else:
            head = f"TEXT {self._literal(trigger)}"
        return self._rule(f"{head} ({' | '.join(tags)})")

    def _separated(self, format_: Format, place: str, depth: int) -> str:
        tags = self._objects(format_, "tags", place)
        separator = self._string(format_, "separator", place)
        bodies = [
            self._tag(tag, f"{place}/tags/{index}", depth + 1) for index, tag in enumerate(tags)
        ]
        any_tag = "(" + " | ".join(bodies) + ")"
        some = any_tag
        if not self._is_so(format_, "stop_after_first", place):
            between = self._literal(separator) if separator else ""
            some = f"({any_tag} ({between} {any_tag})*)"
        return some if self._is_so(format_, "at_least_one", place) else f"{some}?"


_WRITERS: Mapping[str, Callable[[_Writer, Format, str, int], str]] = {
    "const_string": _Writer._const,
    "json_schema": _Writer._json_schema,
    "arguments": _Writer._arguments,
    "regex": _Writer._regex,
    "any_text": _Writer._any_text,
    "sequence": _Writer._sequence,
    "or": _Writer._or,
    "tag": _Writer._tag,
    "triggered_tags": _Writer._triggered,
    "tags_with_separator": _Writer._separated,
}
