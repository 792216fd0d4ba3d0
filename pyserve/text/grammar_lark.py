"""Grammars that clients send -> Lark, in the grammar engine's dialect, within limits.

Lark (with a rule `start: ...`) is passed on as it is, except for JSON schemas within it. GBNF, the
EBNF of llama.cpp that clients of vLLM send (with a rule `root ::= ...`), is converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from llguidance import gbnf_to_lark

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar_json import schema_text
from pyserve.text.grammar_pattern import PatternError, PatternSizeError, engine_pattern
from pyserve.text.grammar_schema import engine_schema

MAX_GRAMMAR_CHARS = 2**16
MAX_NESTING = 100  # nesting of parentheses and brackets
# Number of & and ~, each of which doubles the compile time of regular expressions.
MAX_OPERATORS = 12
MAX_REPEATS = 1000

_IS_LARK = re.compile(r"^\s*(?:%llguidance\b|[?!]?start\b[^:\n]*:(?!:=))", re.MULTILINE)
_IS_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_UNICODE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | /(?P<regex>(?:\\.|[^/\\\n])+)/
      | %(?P<directive>\w+)
      | (?P<repeat>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)
      | (?P<option>\b(?:max_tokens|temperature|stop)\s*=)
      | <\[(?P<ids>[^\]]*)\]>
      | (?P<operator>[&~])
      | (?P<open>[(\[])
      | (?P<close>[)\]])
    """,
    re.VERBOSE,
)


def to_lark(grammar: str, *, has_token: Callable[[int], bool], param: str) -> str:
    """The grammar in Lark. Raises InvalidRequestError for `param`.

    has_token  whether the model has a token with this id; a grammar may name tokens as <[id]>.
    """
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"{param} has {len(grammar)} characters, the limit is {MAX_GRAMMAR_CHARS}", param
        )
    if not _IS_LARK.search(grammar):
        if not _IS_GBNF.search(grammar):
            raise InvalidRequestError(
                f"{param} must be a grammar in Lark, with a rule 'start: ...', or in GBNF, with a "
                "rule 'root ::= ...'",
                param,
            )
        _check_nesting(grammar, param)
        grammar = _from_gbnf(grammar, param)
    return _checked(grammar, has_token, param)


def _from_gbnf(grammar: str, param: str) -> str:
    try:
        # The escapes are replaced first because the converter drops their leading zeros.
        return gbnf_to_lark.gbnf_to_lark(_UNICODE.sub(_character, grammar))
    except Exception as error:  # the converter raises exceptions of many types
        raise InvalidRequestError(f"{param} is not GBNF: {str(error)[:200]}", param) from None


def _character(match: re.Match[str]) -> str:
    code = int(match[1] or match[2], 16)
    return f"\\x{code:02x}" if code < 0x80 or code > 0x10FFFF else chr(code)


def _check_nesting(grammar: str, param: str) -> None:
    depth = 0
    for bracket in re.findall(r"[()]", grammar):  # brackets in strings count too, but are few
        depth += 1 if bracket == "(" else -1
        if depth > MAX_NESTING:
            raise InvalidRequestError(f"{param} is nested deeper than {MAX_NESTING}", param)


def _checked(grammar: str, has_token: Callable[[int], bool], param: str) -> str:
    """The grammar, with each JSON schema in it replaced by what engine_schema makes of it. Raises
    InvalidRequestError.
    """
    pieces, start, depth, num_operators = [], 0, 0, 0
    at = 0
    while match := _TOKEN.search(grammar, at):
        at = match.end()
        kind = match.lastgroup
        if kind == "directive" and match["directive"] == "json":
            pieces.append(grammar[start:at])
            schema, at = _inner_json(grammar, at, param)
            pieces.append(" " + schema)
            start = at
        elif kind == "regex":
            _check_regex(match["regex"], param)
        elif kind == "ids":
            _check_ids(match["ids"], has_token, param)
        elif kind == "repeat":
            if any(int(number[:9]) > MAX_REPEATS for number in re.findall(r"\d+", match[0])):
                raise InvalidRequestError(
                    f"{param} repeats {match[0][:40]}, the limit is {MAX_REPEATS} times", param
                )
        elif kind == "option":
            raise InvalidRequestError(f"{param}: the option {match[0][:20]} is not served", param)
        num_operators += kind == "operator"
        depth += (kind == "open") - (kind == "close")
        if depth > MAX_NESTING:
            raise InvalidRequestError(f"{param} is nested deeper than {MAX_NESTING}", param)
        if num_operators > MAX_OPERATORS:
            raise InvalidRequestError(
                f"{param} has more than {MAX_OPERATORS} operators & and ~", param
            )
    return "".join([*pieces, grammar[start:]])


def _check_regex(pattern: str, param: str) -> None:
    """Check the size alone: the regular expressions of a grammar are in the engine's own syntax."""
    try:
        engine_pattern(pattern)
    except PatternSizeError as error:
        raise InvalidRequestError(f"{param}: /{pattern[:40]}/: {error}", param) from None
    except PatternError:
        return


def _check_ids(listed: str, has_token: Callable[[int], bool], param: str) -> None:
    for token_id in listed.split(","):
        if not re.fullmatch(r"\s*\d{1,9}\s*", token_id) or not has_token(int(token_id)):
            raise InvalidRequestError(
                f"{param}: <[{listed[:40]}]> must list ids of tokens of this model, one by one",
                param,
            )


def _inner_json(grammar: str, at: int, param: str) -> tuple[str, int]:
    """The schema behind a %json directive as text, and the position where it ends."""
    at += len(grammar[at:]) - len(grammar[at:].lstrip())
    try:
        schema, end = json.JSONDecoder().raw_decode(grammar, at)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{param}: what follows %json is not JSON", param) from None
    options = schema.get("x-guidance") if isinstance(schema, dict) else None
    if options is not None:
        raise InvalidRequestError(f"{param}: x-guidance is not served", param)
    return schema_text(engine_schema(schema, param=param, place=", %json")), end
