"""The white space of JSON in an answer, limited so that a model cannot generate it endlessly."""

from __future__ import annotations

import json
import re

from pyserve.errors import InvalidRequestError

# One of these at most between two JSON tokens: a space, or a line break with its indentation.
WHITESPACE = r" |\n {0,32}|\n\t{0,16}"
MAX_RUN = 32  # limit that replaces an unbounded * or + in a client's pattern
MAX_WHITESPACE_CHARS = 200

_BLANK = r"[ \n\r\t]|\\[nrts]"
_BLANKS_ONLY = re.compile(
    rf"(?:{_BLANK}|\[(?:{_BLANK})+\]|\((?:\?:)?|[)|?*+]|\{{\d{{1,2}}(?:,\d{{1,2}})?\}})*"
)


def whitespace_of(pattern: str, *, param: str) -> str:
    """A client's pattern of white space, limited in length. Raises InvalidRequestError for `param`.

    Each unbounded repeat is limited to MAX_RUN, so whatever is written still matches the client's
    pattern.
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
    """The engine's JSON text for a schema that engine_schema has made.

    whitespace  a pattern for the white space between JSON tokens; "" allows none.
    """
    options: dict[str, object] = {"whitespace_flexible": False}
    if whitespace:
        options["whitespace_pattern"] = whitespace
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    assert isinstance(schema, dict)
    return json.dumps({**schema, "x-guidance": options})
