"""Tool call formats whose arguments are JSON: one row for each, and the parser that reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial

import msgspec

from pyserve.text.tool_parsers.json_text import read_string, read_value
from pyserve.text.tool_parsers.source import Fault, Reader
from pyserve.text.tool_parsers.stage import MAX_NAME_CHARS, Parser, Tools, short_id
from pyserve.text.tool_parsers.written import NAME, Written

CALL_ID, ARGUMENTS = "CALL_ID", "ARGUMENTS"  # placeholders in a header, like NAME
MAX_KEY_CHARS = 64
MAX_NESTED = 2  # {"type": "function", "function": {"name": ...}}

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_KNOWN_KEYS = (*_NAME_KEYS, *_ARGUMENT_KEYS, "id", "type")
_NAME_CHARS = re.compile(r"[A-Za-z0-9_.:/-]*")
_GOOD_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Maybe:
    """A literal of a header that may be missing. `steps` follow it only where it is present."""

    literal: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """How a format writes calls. White space may stand between all of its pieces.

    markers, starts, bare and closers are as in Parser.

    objects       characters that begin calls in JSON: "{" an object with a name and arguments, "["
                  a list of such objects. Several objects may follow each other.
    separator     text that may stand between calls.
    header        the other way to write a call: literals, NAME, CALL_ID and ARGUMENTS, in their
                  order.
    num_id_chars  number of letters and digits that the model's template requires in a call's id; 0:
                  any id will do.
    written       how a grammar makes the model write calls: the first of these whose marks are all
                  tokens of the model, or else the last one.
    """

    markers: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    bare: str = ""
    closers: tuple[str, ...] = ()
    objects: str = ""
    separator: str = ""
    header: tuple[str | Maybe, ...] = ()
    num_id_chars: int = 0
    written: tuple[Written, ...] = ()

    @property
    def literals(self) -> tuple[str, ...]:
        """All texts that stand around and between names and arguments."""
        steps = [step.literal if isinstance(step, Maybe) else step for step in self.header]
        steps = [step for step in steps if step not in (NAME, CALL_ID, ARGUMENTS)]
        return (*self.markers, *self.starts, *self.closers, *steps)


_BEGIN, _END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_ALL, _ALL_END, _SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"
_IN_JSON = ('{"name": "NAME", "arguments": ', "}")
FORMATS: dict[str, Format] = {
    "hermes": Format(
        markers=("<tool_call>",),
        closers=("</tool_call>",),
        objects="{[",
        written=(
            Written(
                ('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
                between="\n", trigger="<tool_call>",
            ),
        ),
    ),
    "granite": Format(
        markers=("<|tool_call|>", "<tool_call>"),
        closers=("</tool_call>",),
        bare="[",
        objects="[{",
        written=tuple(
            Written(_IN_JSON, (f"{marker}[", "]"), ", ", marker)
            for marker in ("<|tool_call|>", "<tool_call>")
        ),
    ),
    "llama3_json": Format(
        markers=("<|python_tag|>",),
        bare="{",
        objects="{[",
        separator=";",
        written=(Written(('{"name": "NAME", "parameters": ', "}"), between="; ", bare="{"),),
    ),
    "phi4_mini_json": Format(
        markers=("functools", "<|tool_call|>"),
        closers=("<|/tool_call|>",),
        objects="[",
        written=(Written(_IN_JSON, ("functools[", "]"), ", ", "functools["),),
    ),
    "mistral": Format(
        markers=("[TOOL_CALLS]",),
        objects="[{",
        header=(NAME, Maybe("[CALL_ID]", (CALL_ID,)), Maybe("[ARGS]"), ARGUMENTS),
        num_id_chars=9,
        written=(
            Written(("[TOOL_CALLS]NAME[ARGS]", ""), trigger="[TOOL_CALLS]"),
            Written(_IN_JSON, ("[TOOL_CALLS] [", "]"), ", ", "[TOOL_CALLS]"),
        ),
    ),
    "deepseek_v3": Format(
        markers=(_ALL,),
        starts=(_BEGIN,),
        closers=(_ALL_END,),
        header=(
            _BEGIN, Maybe(f"function{_SEP}"), NAME, Maybe(_SEP), Maybe("```json"), ARGUMENTS,
            Maybe("```"), Maybe(_END),
        ),
        written=(
            Written(
                (f"{_BEGIN}function{_SEP}NAME\n```json\n", f"\n```{_END}"),
                (_ALL, _ALL_END), "\n", _ALL,
            ),
        ),
    ),
    # No model's own format: for required calls where no parser is set, or where the model's own
    # format cannot express a tool's schema.
    "json": Format(bare="[", objects="[", written=(Written(_IN_JSON, ("[", "]"), ", "),)),
}  # fmt: skip


@dataclass(slots=True)
class _Call:
    """What is known of a call while its object is read.

    held  arguments that came before the name; None if there were none.
    """

    is_bare: bool
    name: str | None = None
    call_id: str | None = None
    held: list[str] | None = None
    has_arguments: bool = False
    is_open: bool = field(default=False)


class JsonParser(Parser):
    """Reads the calls of one answer in the way that its Format describes."""

    def __init__(self, tools: Tools, format: Format) -> None:
        self.markers, self.starts = format.markers, format.starts
        self.bare, self.closers = format.bare, format.closers
        if format.num_id_chars:
            self.make_id = partial(short_id, format.num_id_chars)
        self._format = format
        super().__init__(tools)

    def read_calls(self, *, is_bare: bool) -> Reader[None]:
        source = self.source
        while True:
            yield from source.skip_white()
            char = yield from source.peek()
            if char == "[" and "[" in self._format.objects:
                yield from self._read_list(is_bare)
            elif char == "{" and "{" in self._format.objects:
                yield from self._read_object(is_bare)
            elif self._format.header and not is_bare:
                yield from self._read_header()
            else:
                raise Fault
            source.settle()
            yield from self._find_next()

    def _find_next(self) -> Reader[None]:
        """Read up to a call that follows without a marker. Raises Fault if there is none."""
        source = self.source
        yield from source.skip_white()
        if self._format.separator:
            yield from source.accept(self._format.separator)
            yield from source.skip_white()
        for start in self.starts:
            if (yield from source.accept(start)):
                source.position -= len(start)
                return
        if "{" not in self._format.objects or (yield from source.peek()) != "{":
            raise Fault

    def _read_list(self, is_bare: bool) -> Reader[None]:
        source = self.source
        yield from source.expect("[")
        while True:
            yield from source.skip_white()
            yield from self._read_object(is_bare)
            source.settle()
            yield from source.skip_white()
            if (yield from source.accept("]")):
                return
            yield from source.expect(",")

    def _read_object(self, is_bare: bool) -> Reader[None]:
        call = _Call(is_bare)
        yield from self._read_members(call, 1)
        if not call.is_open:
            if is_bare and not call.has_arguments:
                raise Fault
            self._open(call)
            self.say("".join(call.held or ["{}"]))
            self.close()
        self.source.settle()

    def _read_members(self, call: _Call, depth: int) -> Reader[None]:
        source = self.source
        yield from source.expect("{")
        yield from source.skip_white()
        if (yield from source.accept("}")):
            return
        while True:
            key = yield from self._read_short(MAX_KEY_CHARS)
            yield from source.skip_white()
            yield from source.expect(":")
            yield from source.skip_white()
            yield from self._read_member(call, key, depth)
            yield from source.skip_white()
            if (yield from source.accept("}")):
                return
            yield from source.expect(",")
            yield from source.skip_white()

    def _read_member(self, call: _Call, key: str, depth: int) -> Reader[None]:
        char = yield from self.source.peek()
        if key in _NAME_KEYS and char == '"' and call.name is None:
            call.name = yield from self._read_short(MAX_NAME_CHARS)
            if call.is_bare and call.name not in self.tools.parameters:
                raise Fault
            if call.held is not None:
                self._open(call)
                self.say("".join(call.held))
                self.close()
        elif key == "function" and char == "{" and depth < MAX_NESTED:
            yield from self._read_members(call, depth + 1)
        elif key in _ARGUMENT_KEYS and not call.has_arguments:
            yield from self._read_arguments(call)
        elif key == "id" and char == '"':
            call_id = yield from self._read_short(MAX_NAME_CHARS)
            call.call_id = call_id if _GOOD_ID.fullmatch(call_id) else None
        elif call.is_bare and not call.is_open and key not in _KNOWN_KEYS:
            raise Fault
        else:
            yield from read_value(self.source, _drop)

    def _open(self, call: _Call) -> None:
        if call.name is None:
            raise Fault
        self.open(call.name, call_id=call.call_id, is_bare=call.is_bare)
        call.is_open = True

    def _read_arguments(self, call: _Call) -> Reader[None]:
        """Read arguments, which are an object, a JSON string that holds one, or null."""
        char = yield from self.source.peek()
        if char == "{" and call.name is not None:
            self._open(call)
            yield from read_value(self.source, self.say)
            self.close()
        else:
            held: list[str] = []
            yield from read_value(self.source, held.append)
            text = "".join(held)
            if char == '"':
                text = _decoded(text).strip() or "{}"
                _check_object(text)
            elif text == "null":
                text = "{}"
            elif char != "{":
                raise Fault
            call.held = [text]
            if call.name is not None:
                self._open(call)
                self.say(text)
                self.close()
        call.has_arguments = True

    def _read_header(self) -> Reader[None]:
        steps = list(self._format.header)
        call = _Call(is_bare=False)
        while steps:
            step = steps.pop(0)
            yield from self.source.skip_white()
            if isinstance(step, Maybe):
                if (yield from self.source.accept(step.literal)):
                    steps[:0] = step.steps
            elif step == NAME:
                call.name = yield from self.source.run(_NAME_CHARS, MAX_NAME_CHARS)
            elif step == CALL_ID:
                call_id = yield from self.source.run(_NAME_CHARS, MAX_NAME_CHARS)
                call.call_id = call_id if _GOOD_ID.fullmatch(call_id) else None
            elif step == ARGUMENTS:
                if (yield from self.source.peek()) != "{":
                    raise Fault
                yield from self._read_arguments(call)
            else:
                yield from self.source.expect(step)
            if call.is_open:  # what ends a call is dropped as markup, even if it is incomplete
                self.source.settle()

    def _read_short(self, max_chars: int) -> Reader[str]:
        """The value of a JSON string of at most `max_chars` characters. Raises Fault if it is
        longer.
        """
        pieces: list[str] = []
        start = self.source.num_held

        def take(piece: str) -> None:
            pieces.append(piece)
            if self.source.num_held - start > 6 * max_chars + 2:
                raise Fault

        yield from read_string(self.source, take)
        text = _decoded("".join(pieces))
        if len(text) > max_chars:
            raise Fault
        return text


def _drop(text: str) -> None:
    pass


def _decoded(text: str) -> str:
    """The value of a JSON string. Raises Fault if it is not Unicode: it has a lone surrogate."""
    try:
        return msgspec.json.decode(text, type=str)
    except (msgspec.DecodeError, UnicodeError):
        raise Fault from None


def _check_object(text: str) -> None:
    try:
        msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise Fault from None
