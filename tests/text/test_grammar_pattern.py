from __future__ import annotations

import random
import re

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import Regex, compile_grammar
from pyserve.text.grammar_json import whitespace_of
from pyserve.text.grammar_pattern import (
    MAX_GROUPS_DEPTH,
    MAX_PATTERN_CHARS,
    SAME,
    PatternError,
    all_but,
    engine_pattern,
    without_lookaheads,
)
from tests.text.grammars import text_of, vocabulary

READ = [
    ("a[b-d]*", "a[b-d]*"),
    (r"\d\w\D\W\s", r"[0-9][0-9A-Za-z_][^0-9][^0-9A-Za-z_]\s"),
    (r"[\d\w.-]", r"[0-90-9A-Za-z_.-]"),
    ("[a&&b[c~]", r"[a\&\&b\[c\~]"),
    (r"[^\]\\]+", r"[^\]\\]+"),
    ("{x}", r"\{x\}"),
    ("a{2}b{3,}c{4,5}?", "a{2}b{3,}c{4,5}?"),
    (r"\u0041\x42\/\-\0", r"\u0041\x42\/\-\x00"),
    (r"\p{Lu}\u{1F600}", r"\p{Lu}\u{1F600}"),
    ("(?:a)(?<n>b)(?P<m>c)(?i)(?s:.)", "(?:a)(?<n>b)(?P<m>c)(?i)(?s:.)"),
    ("ä\0", "ä\0"),
    (r"\é", "é"),
]
REFUSED = [
    ("(?=a)", "(?=a"), ("(?!a)", "(?!a"), ("(?<=a)", "(?<="), ("(?<!a)", "(?<!"),
    ("(?P=n)", "(?P="),
    ("(?(1)a)", "(?(1"), (r"\1", r"\1"), (r"\k<n>", r"\k"), (r"\b", r"\b"), (r"\B", r"\B"),
    ("[]a]", "begins with ]"), ("[^]", "begins with ]"), ("[a--b]", "--"), (r"[\b]", r"\b"),
    (r"[\W]", r"\W"), ("[a", "is not closed"), ("(a", "is not closed"), ("a)", "not open"),
    ("a\\", "ends with a backslash"), ("a{,3}", "write {0,N}"), ("a{100000}", "written out"),
    ("a{1000000}", "too often"),
    ("a{99999999999}", "too often"), ("((a{0,200}){0,200}){0,200}", "written out"),
    ("(a{1000}){1000}", "written out"), (".{1,100000}", "written out"),
    ("(" * (MAX_GROUPS_DEPTH + 2) + ")" * (MAX_GROUPS_DEPTH + 2), "nested deeper"),
    ("a" * (MAX_PATTERN_CHARS + 1), "characters, the limit"),
]  # fmt: skip
FULL = [
    "[ab]{3}c?",
    r"^\d{2}-[x&y]$",
    "(yes|no)!{0,2}",
    r"[^\x00-\x7f]{1,3}",
    "^(?:a|b+)$",
    r"a\.b",
]


@pytest.mark.parametrize(("pattern", "expected"), READ)
def test_read(pattern: str, expected: str) -> None:
    assert engine_pattern(pattern) == expected


@pytest.mark.parametrize(("pattern", "reason"), REFUSED)
def test_refused(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=re.escape(reason)):
        engine_pattern(pattern)
    with pytest.raises(InvalidRequestError, match="^guided_regex: "):
        compile_grammar(Regex(param="guided_regex", pattern=pattern), vocabulary())


@pytest.mark.parametrize("pattern", FULL)
def test_answers_match_in_whole(pattern: str) -> None:
    for seed in range(8):
        text = text_of(Regex(param="r", pattern=pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text), text


def test_what_the_engine_does_not_know_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="guided_regex cannot be enforced: .*regex"):
        compile_grammar(Regex(param="guided_regex", pattern=r"\h"), vocabulary())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[ ]?", "[ ]?"),
        (r"[\n\t ]*", r"[\n\t ]{0,32}"),
        (r"\s+", r"[ \n\r\t]{1,32}"),
        ("", ""),
        (r"( |\n {1,20})?", r"( |\n {1,20})?"),
    ],
)
def test_white_space_of_a_client_gets_an_end(pattern: str, expected: str) -> None:
    assert whitespace_of(pattern, param="p") == expected


@pytest.mark.parametrize("pattern", ["a", "[ x]", "[ ]{0,1000}", "(", " " * 300, "[^a]", "**"])
def test_other_white_space_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match="^p"):
        whitespace_of(pattern, param="p")


@pytest.mark.parametrize("pattern", [*SAME, "^(?=.*[A-Z])(?=x|.+y$)[a-zA-Z]+$", "^(?=a)"])
def test_conditions_at_the_beginning_are_patterns_of_their_own(pattern: str) -> None:
    parts = without_lookaheads(pattern)
    assert not any("(?=" in part or "(?!" in part for part in parts)
    rng = random.Random(1)
    num_matching = 0
    for _ in range(20_000):
        text = "".join(rng.choices("aA1.@-+'xy", k=rng.randint(0, 8)))
        if rng.random() < 0.5:
            text += "@a.aA"
        matches = re.search(pattern, text) is not None
        assert matches is all(re.search(part, text) for part in parts), text
        num_matching += matches
    assert num_matching > 20


@pytest.mark.parametrize(
    "pattern", ["^(?=a", "^(?=a)b|c", "^(?=a)?b", "^(?!a)b", "(?=a)b", "^(?=[)]"]
)
def test_other_conditions_stay(pattern: str) -> None:
    assert without_lookaheads(pattern) == [pattern]
    with pytest.raises(PatternError):
        engine_pattern(pattern)


@pytest.mark.parametrize(
    "excluded", [["a"], [""], ["US", "USA", "U.", ""], ["é[^]-\\&&~", "é"], []]
)
def test_a_pattern_of_all_but_some_texts(excluded: list[str]) -> None:
    pattern = re.compile(all_but(set(excluded)))
    read = re.compile(engine_pattern(all_but(set(excluded))))
    rng = random.Random(0)
    others = ["", "a", "aa", "U", "US", "USA", "USAB", "UX", "é", "é[", "\n", "a\n", "\0"]
    others += ["".join(rng.choices("é[^]-\\&~US.A", k=rng.randrange(9))) for _ in range(300)]
    for text in [*others, *excluded]:
        assert bool(pattern.search(text)) == bool(read.search(text)) == (text not in excluded)
