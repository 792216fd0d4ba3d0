"""The tool call parsers, by their names for --tool-call-parser."""

from __future__ import annotations

from dataclasses import dataclass

from pyserve.errors import ConfigError
from pyserve.text.tokenizer import Tokenizer
from pyserve.text.tool_parsers.json_formats import FORMATS, JsonParser
from pyserve.text.tool_parsers.pythonic import PythonicParser
from pyserve.text.tool_parsers.qwen3_coder import QwenCoderParser
from pyserve.text.tool_parsers.stage import Parser, Tools, fitted_id
from pyserve.text.tool_parsers.written import Written

_CLASSES: dict[str, type[PythonicParser] | type[QwenCoderParser]] = {
    "pythonic": PythonicParser,
    "qwen3_coder": QwenCoderParser,
}
PLAIN_JSON = "json"
NAMES = tuple(sorted([*FORMATS.keys() - {PLAIN_JSON}, *_CLASSES]))


def make_parser(name: str, tools: Tools) -> Parser:
    """A parser for one answer."""
    if name in _CLASSES:
        return _CLASSES[name](tools)
    return JsonParser(tools, FORMATS[name])


def literals(name: str) -> tuple[str, ...]:
    """All texts that mark calls in a format. Those that are special tokens must be shown in the
    text.
    """
    if name in FORMATS:
        return FORMATS[name].literals
    parser = _CLASSES[name]
    return (*parser.markers, *parser.starts, *parser.closers)


def check_name(name: str | None) -> None:
    """Raise ConfigError if no parser has the name that was given for --tool-call-parser."""
    if name is not None and name not in NAMES:
        raise ConfigError(f"--tool-call-parser must be one of {', '.join(NAMES)}, got {name[:80]}")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A tool call format together with the model that writes it.

    written     how a grammar makes the model write calls.
    marker_ids  special tokens that mark calls: the text that the parser gets must show them.
    """

    name: str
    written: Written
    marker_ids: frozenset[int] = frozenset()

    @classmethod
    def named(cls, name: str | None, tokenizer: Tokenizer) -> ToolFormat | None:
        """The format with this name for a tokenizer's model. None if the name is None."""
        if name is None:
            return None
        ids = {tokenizer.token_to_id(literal) for literal in literals(name)}
        return cls(name, _written(name, tokenizer), tokenizer.special_token_ids & ids)

    def fitted_id(self, given: str) -> str:
        """The id of a call in a client's message, changed to the form that the model's template
        requires.
        """
        row = FORMATS.get(self.name)
        return fitted_id(given, row.num_id_chars) if row is not None else given

    def stage(self, tools: Tools) -> Parser:
        """A parser for one answer."""
        return make_parser(self.name, tools)


JSON_FORMAT = ToolFormat(PLAIN_JSON, FORMATS[PLAIN_JSON].written[0])


def _written(name: str, tokenizer: Tokenizer) -> Written:
    """The first form whose marks are all tokens of the model; the last one if there is none."""
    several = FORMATS[name].written if name in FORMATS else _CLASSES[name].written
    for written in several[:-1]:
        text = written.around[0] + written.call[0]
        marks = [literal for literal in literals(name) if literal in text]
        if all(tokenizer.token_to_id(mark) is not None for mark in marks):
            return written
    return several[-1]
