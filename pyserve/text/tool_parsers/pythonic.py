"""Calls as a Python list: [get_weather(city="Paris", days=2), now()]."""

from __future__ import annotations

import re

from pyserve.text.tool_parsers.json_text import quoted
from pyserve.text.tool_parsers.python_text import read_literal
from pyserve.text.tool_parsers.source import Fault, Reader
from pyserve.text.tool_parsers.stage import MAX_NAME_CHARS, Parser
from pyserve.text.tool_parsers.written import Written

_NAME_CHARS = re.compile(r"[A-Za-z0-9_.]*")


class PythonicParser(Parser):
    """Arguments are keyword arguments with literal values; they are delivered as JSON."""

    markers = ("<|python_start|>",)
    bare = "["
    closers = ("<|python_end|>",)
    is_rest_json = False
    written = (Written(("NAME(", ")"), ("[", "]"), ", ", bare="[", form="python"),)

    def read_calls(self, *, is_bare: bool) -> Reader[None]:
        source = self.source
        yield from source.skip_white()
        yield from source.expect("[")
        while True:
            yield from source.skip_white()
            yield from self._read_call(is_bare)
            source.settle()
            yield from source.skip_white()
            if (yield from source.accept("]")):
                return
            yield from source.expect(",")

    def _read_call(self, is_bare: bool) -> Reader[None]:
        source = self.source
        name = yield from source.run(_NAME_CHARS, MAX_NAME_CHARS)
        if is_bare and name not in self.tools.parameters:
            raise Fault
        yield from source.expect("(")
        yield from source.skip_white()
        before = "{"
        while not (yield from source.accept(")")):
            key = yield from source.run(_NAME_CHARS, MAX_NAME_CHARS)
            if not key:
                raise Fault
            yield from source.skip_white()
            yield from source.expect("=")
            if before == "{":
                self.open(name, is_bare=is_bare)
            self.say(f'{before}"{quoted(key)}": ')
            before = ", "
            yield from read_literal(source, self.say)
            yield from source.skip_white()
            if not (yield from source.accept(",")):
                if (yield from source.peek()) != ")":
                    raise Fault
            yield from source.skip_white()
        if before == "{":
            self.open(name, is_bare=is_bare)
            self.say("{")
        self.say("}")
        self.close()
