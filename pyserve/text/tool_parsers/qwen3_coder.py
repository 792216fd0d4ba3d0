"""Qwen3-Coder's calls, which are written in tags:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Values are bare text. The tool's schema tells which JSON values they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pyserve.text.tool_parsers.json_text import quoted
from pyserve.text.tool_parsers.source import MAX_HELD_CHARS, Ended, Fault, Reader
from pyserve.text.tool_parsers.stage import MAX_NAME_CHARS, Parser
from pyserve.text.tool_parsers.tagged_values import END_VALUE, as_json, types_of
from pyserve.text.tool_parsers.written import Written

_NAME_CHARS = re.compile(r"[^<>\n]*")
_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_FUNCTION = "</function>"
# What the text may end with while the end of a value arrives, the longest first: "\n</param".
_BEGINNINGS = tuple(f"\n{END_VALUE}"[:n] for n in range(len(END_VALUE), 0, -1))
_BEGINNINGS += tuple(END_VALUE[:n] for n in range(len(END_VALUE) - 1, 0, -1))


class QwenCoderParser(Parser):
    """Strings are delivered as they arrive, other values when they are complete."""

    markers = ("<tool_call>",)
    starts = (_FUNCTION,)
    closers = ("</tool_call>",)
    is_rest_json = False
    written = (
        Written(
            ("<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>"),
            between="\n", trigger=_FUNCTION, form="tags",
        ),
    )  # fmt: skip

    def read_calls(self, *, is_bare: bool) -> Reader[None]:
        while True:
            yield from self.source.skip_white()
            yield from self._read_function()
            self.source.settle()

    def _read_function(self) -> Reader[None]:
        source = self.source
        yield from source.expect(_FUNCTION)
        name = (yield from source.run(_NAME_CHARS, MAX_NAME_CHARS)).strip()
        yield from source.expect(">")
        self.open(name)
        schema = self.tools.parameters.get(name, {})
        properties = schema.get("properties")
        before = "{"
        while True:
            yield from source.skip_white()
            if (yield from source.accept(_END_FUNCTION)):
                break
            yield from source.expect(_PARAMETER)
            key = (yield from source.run(_NAME_CHARS, MAX_NAME_CHARS)).strip()
            yield from source.expect(">")
            self.say(f'{before}"{quoted(key)}": ')
            before = ", "
            types = types_of(properties.get(key) if isinstance(properties, Mapping) else None)
            if types == {"string"}:
                yield from self._read_text()
            else:
                yield from self._read_other(types)
        self.say("{}" if before == "{" else "}")
        self.close()

    def _read_text(self) -> Reader[None]:
        """Read a string. One line break at either end belongs to the tags."""
        source = self.source
        self.say('"')
        yield from source.peek()
        yield from source.accept("\n")
        while True:
            end = source.text.find(END_VALUE, source.position)
            if end >= 0:
                text = source.advance(end - source.position)
                source.advance(len(END_VALUE))
                self.say(quoted(text.removesuffix("\n")) + '"')
                return
            if source.is_ended:
                raise Ended
            rest = source.text[source.position :]
            begun = next((len(b) for b in _BEGINNINGS if rest.endswith(b)), 0)
            self.say(quoted(source.advance(len(rest) - begun)))
            yield

    def _read_other(self, types: frozenset[str]) -> Reader[None]:
        source = self.source
        while (length := source.text.find(END_VALUE, source.position) - source.position) < 0:
            if len(source.text) - source.position > MAX_HELD_CHARS + len(END_VALUE):
                raise Fault
            if source.is_ended:
                raise Ended
            yield
        if length > MAX_HELD_CHARS:
            raise Fault
        value = source.advance(length)
        source.advance(len(END_VALUE))
        self.say(as_json(value, types))
