from __future__ import annotations

import re

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import Grammar, compile_grammar
from pyserve.text.grammar_lark import MAX_GRAMMAR_CHARS, MAX_NESTING, MAX_REPEATS, to_lark
from tests.text.grammars import text_of, vocabulary

SQL = """
root ::= select
select ::= "SELECT " column " FROM " table-name (" WHERE " condition)?  # a comment
column ::= "id" | "name" | "*"
table-name ::= [a-c]{1,3}
condition ::= column " = " ([0-9] [0-9]?
    | "\\u00e9\\x41")
"""
LARK = r"""
?start: select
select: "SELECT " column ("," column)* " FROM " TABLE
column: "id" | "name"
TABLE: /[a-c]{1,3}/
"""
REFUSED = [
    ("", "must be a grammar in Lark"),
    ("foo: bar", "must be a grammar in Lark"),
    ("x" * (MAX_GRAMMAR_CHARS + 1), "characters, the limit"),
    ("root ::= (", "is not GBNF"),
    ("root ::= undefined", "'undefined' not found"),
    ("other ::= [a]", "No 'root' rule"),
    ('root ::= "\\q"', "Invalid escape"),
    ("root ::= " + "(" * (MAX_NESTING + 1), "nested deeper"),
    ("start: " + "(" * (MAX_NESTING + 1), "nested deeper"),
    (f'start: "a"{{1,{MAX_REPEATS + 1}}}', "the limit is"),
    ('start: "a"~1..1000000', "the limit is"),
    (f'root ::= "a"{{{MAX_REPEATS + 1}}}', "the limit is"),
    ("start: A\nA: " + " & ".join(["/a*/"] * 14), "operators & and ~"),
    ("start: A\nA: /((a{0,200}){0,200}){0,200}/", "written out"),
    ("start: x[max_tokens=3]\nx: /a/", "the option max_tokens= is not served"),
    ('start: %json {"not": 1}', "%json at /not: not cannot be enforced"),
    ('start: %json {"type": "string"', "what follows %json is not JSON"),
    ('start: %json {"x-guidance": {"lenient": true}}', "x-guidance is not served"),
]
NOT_COMPILED = ["start: undefined_rule", "start: /(?=a)/", "start: @other", "start: start"]


@pytest.mark.parametrize(("grammar", "reason"), REFUSED)
def test_refused(grammar: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as caught:
        to_lark(grammar, has_token=vocabulary().has_token, param="guided_grammar")
    assert str(caught.value).startswith("guided_grammar")
    assert caught.value.param == "guided_grammar"


@pytest.mark.parametrize("grammar", NOT_COMPILED)
def test_not_compiled(grammar: str) -> None:
    with pytest.raises(InvalidRequestError, match="^g ") as caught:
        compile_grammar(Grammar(param="g", text=grammar), vocabulary())
    assert "\n" not in str(caught.value)


def test_gbnf_as_clients_of_vllm_send_it() -> None:
    pattern = r"SELECT (id|name|\*) FROM [a-c]{1,3}( WHERE (id|name|\*) = ([0-9]{1,2}|éA))?"
    texts = {text_of(Grammar(param="g", text=SQL), seed) for seed in range(12)}
    assert len(texts) > 6
    for text in texts:
        assert text is not None
        assert re.fullmatch(pattern, text), text


def test_lark_as_clients_of_vllm_send_it() -> None:
    for seed in range(8):
        text = text_of(Grammar(param="g", text=LARK), seed)
        assert text is not None
        assert re.fullmatch(r"SELECT (id|name)(,(id|name))* FROM [a-c]{1,3}", text), text


def test_strings_and_comments_are_not_looked_into() -> None:
    grammar = 'start: "&~%json{1,99999}(((" // & & ~ {5000,}\n'
    assert text_of(Grammar(param="g", text=grammar)) == "&~%json{1,99999}((("


def test_an_inner_schema_is_read_as_any_other() -> None:
    grammar = r"""start: "<" %json {
        "definitions": {"x": {"const": 1}}, "$ref": "#/definitions/x"
    } ">" """
    assert text_of(Grammar(param="g", text=grammar)) == "<1>"
