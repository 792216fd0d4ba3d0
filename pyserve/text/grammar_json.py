"""How JSON may be laid out in an answer: white space, bounded so that no model can loop in it."""

from __future__ import annotations

import json
import re

from pyserve.errors import InvalidRequestError

# At most one of these at each place: a space, or a line break with its indentation.
WHITESPACE = r" |\n {0,32}|\n\t{0,16}"
MAX_RUN = 32  # characters that an unbounded * or + of a client's pattern stands for
MAX_WHITESPACE_CHARS = 200

_BLANK = r"[ \n\r\t]|\\[nrts]"
_BLANKS_ONLY = re.compile(
    rf"(?:{_BLANK}|\[(?:{_BLANK})+\]|\((?:\?:)?|[)|?*+]|\{{\d{{1,2}}(?:,\d{{1,2}})?\}})*"
)


def whitespace_of(pattern: str, *, param: str) -> str:
    """A client's pattern of white space, with an end. Raises InvalidRequestError for `param`.

    What it lets be longer than MAX_RUN is cut there: what is written still matches the pattern.
    """
    if len(pattern) > MAX_WHITESPACE_CHARS or not _BLANKS_ONLY.fullmatch(pattern):
        raise InvalidRequestError(
            f"{param} must be a pattern of spaces, tabs and line breaks such as [ \\n]{{0,4}}, of "
            f"at most {MAX_WHITESPACE_CHARS} characters, got {pattern[:80]!r}",
            param,
        )
    pattern = re.sub(r"\[[^\]]*\]", lambda match: match[0].replace(r"\s", r" \n\r\t"), pattern)
    pattern = pattern.replace(r"\s", r"[ \n\r\t]")
    pattern = pattern.replace("*", f"{{0,{MAX_RUN}}}").replace("+", f"{{1,{MAX_RUN}}}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidRequestError(f"{param}: {error}", param) from None
    return pattern


def schema_text(schema: object, whitespace: str = WHITESPACE) -> str:
    """A schema of engine_schema's for the engine; white space as `whitespace` has it, "": none."""
    options: dict[str, object] = {"whitespace_flexible": False}
    if whitespace:
        options["whitespace_pattern"] = whitespace
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    assert isinstance(schema, dict)
    return json.dumps({**schema, "x-guidance": options})
