from __future__ import annotations

import ast
import json

import pytest

from pyserve.text.tool_parsers.python_text import json_of


@pytest.mark.parametrize(
    "text",
    [
        "1", "-2.5e3", "1_000", ".5", "+3", "1.", "007.5", "True", "None", "[]", "{}", "[1, 'a', ]",
        "{'a': {\"b\": [False, None]}, }", "'it\\'s'", '"a\\n\\t\\x41\\u00e9\\U0001F600"',
        "'''a\nb'''", '"""say "this" now"""', "''", '""', "'\\d'", "'a\\\nb'",
    ],
)  # fmt: skip
def test_reads_what_python_reads(text: str) -> None:
    found = json_of(text)
    assert found is not None
    expected = ast.literal_eval(text) if "007" not in text and "\\d" not in text else None
    if expected is not None:
        assert json.loads(found) == expected
    else:
        json.loads(found)


@pytest.mark.parametrize(
    "text",
    ["f(1)", "1 + 1", "a", "{1, 2}", "(1, 2)", "{'a': }", "[,]", "[1 2]", "'a", "b'a'", "1__0", "",
     "'\\ud800'", "'\\xg'", "1j", "{1: 2}", "[" * 100_000, "{'a'", "1 2"],
)  # fmt: skip
def test_anything_else_is_nothing(text: str) -> None:
    assert json_of(text) is None
