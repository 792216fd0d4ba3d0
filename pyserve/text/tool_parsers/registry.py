"""The parsers of tool calls by the names that --tool-call-parser knows."""

from __future__ import annotations

from pyserve.text.tool_parsers.json_formats import FORMATS, JsonParser
from pyserve.text.tool_parsers.pythonic import PythonicParser
from pyserve.text.tool_parsers.qwen3_coder import QwenCoderParser
from pyserve.text.tool_parsers.stage import Parser, Tools

_CLASSES: dict[str, type[PythonicParser] | type[QwenCoderParser]] = {
    "pythonic": PythonicParser,
    "qwen3_coder": QwenCoderParser,
}
NAMES = tuple(sorted([*FORMATS, *_CLASSES]))


def make_parser(name: str, tools: Tools) -> Parser:
    """A parser for one answer."""
    if name in _CLASSES:
        return _CLASSES[name](tools)
    return JsonParser(tools, FORMATS[name])


def literals(name: str) -> tuple[str, ...]:
    """All that a format marks calls with: where it is a special token, a text must show it."""
    if name in FORMATS:
        return FORMATS[name].literals
    parser = _CLASSES[name]
    return (*parser.markers, *parser.starts, *parser.closers)
