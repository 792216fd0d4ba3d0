from __future__ import annotations

import random
import time
from typing import Any

import pytest

from pyserve.allocator import used_bytes
from pyserve.errors import InvalidRequestError, QueueFullError
from pyserve.text import grammar
from pyserve.text.grammar import (
    MAX_CACHED,
    MAX_CHOICES,
    MAX_SPEC_BYTES,
    Choice,
    Grammar,
    GrammarCache,
    JsonSchema,
    Regex,
    Spec,
    compile_grammar,
)
from pyserve.text.grammar_matcher import measure_all
from pyserve.text.grammar_schema import MAX_DEPTH
from tests.text.grammars import allowed, text_of, vocabulary


def choice(*texts: str) -> Choice:
    return Choice(param="c", texts=list(texts))


def test_one_of_the_choices() -> None:
    texts = ["yes", "y+e(s)?", "no\nnever", "é😀", "a b#&-~/\\"]
    assert {text_of(choice(*texts), seed) for seed in range(60)} == set(texts)


@pytest.mark.parametrize("texts", [[], ["x"] * (MAX_CHOICES + 1)])
def test_choices_have_a_number(texts: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^c must list 1 to {MAX_CHOICES} texts"):
        compile_grammar(choice(*texts), vocabulary())


@pytest.mark.parametrize(
    "spec",
    [
        choice("x" * MAX_SPEC_BYTES),
        Regex(param="c", pattern="x" * MAX_SPEC_BYTES),
        JsonSchema(param="c", schema={"description": "x" * MAX_SPEC_BYTES}),
    ],
)
def test_what_is_too_large_is_refused_by_its_bytes(spec: Spec) -> None:
    with pytest.raises(InvalidRequestError, match=f"^c takes .* bytes or more, .* {2**18}"):
        compile_grammar(spec, vocabulary())


@pytest.mark.parametrize(
    "spec",
    [
        choice("\ud800"),
        Regex(param="c", pattern="\ud800"),
        Grammar(param="c", text='start: "\ud800"'),
        JsonSchema(param="c", schema={"properties": {"\udfff": {}}}),
    ],
)
def test_half_a_character_is_refused(spec: Spec) -> None:
    with pytest.raises(InvalidRequestError, match="^c is not Unicode text"):
        compile_grammar(spec, vocabulary())


def test_the_deepest_schema_compiles() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(MAX_DEPTH):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())


def test_what_takes_long_for_one_mask_is_refused() -> None:
    """All answers of a step wait for its slowest mask."""
    slow = Grammar(param="c", text="start: " + '("a"?)' * 8000)
    with pytest.raises(InvalidRequestError, match="^c is too complex: .* limit is 100 ms"):
        compile_grammar(slow, vocabulary())


def test_an_error_of_the_engine_has_no_trace() -> None:
    broken = Grammar(param="c", text='start: a "b"\na[lazy]: /.*/')
    with pytest.raises(InvalidRequestError, match="^c allows nothing, or is too complex") as caught:
        compile_grammar(broken, vocabulary())
    assert "unknown" not in caught.value.message


def test_equal_specs_are_compiled_once() -> None:
    cache = GrammarCache()
    first = compile_grammar(JsonSchema(param="s", schema={"enum": [1]}), vocabulary(), cache=cache)
    again = compile_grammar(JsonSchema(param="s", schema={"enum": [1]}), vocabulary(), cache=cache)
    other = compile_grammar(JsonSchema(param="t", schema={"enum": [1]}), vocabulary(), cache=cache)
    typed = compile_grammar(JsonSchema(param="s", schema={"enum": [True]}), vocabulary(),
                            cache=cache)  # fmt: skip
    assert first is again
    assert len({id(first), id(other), id(typed)}) == 3


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = GrammarCache()
    first = compile_grammar(choice("first"), vocabulary(), cache=cache)
    for number in range(MAX_CACHED - 1):
        compile_grammar(choice(str(number)), vocabulary(), cache=cache)
    assert compile_grammar(choice("first"), vocabulary(), cache=cache) is first
    second = compile_grammar(choice("0"), vocabulary(), cache=cache)
    compile_grammar(choice("one more"), vocabulary(), cache=cache)  # takes the place of "1"
    assert compile_grammar(choice("first"), vocabulary(), cache=cache) is first
    assert compile_grammar(choice("0"), vocabulary(), cache=cache) is second


def test_the_cache_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = GrammarCache()
    first = compile_grammar(choice("first"), vocabulary(), cache=cache)
    monkeypatch.setattr(grammar, "MAX_CACHED_BYTES", 4 * first.num_bytes)
    kept = [compile_grammar(choice(str(number)), vocabulary(), cache=cache) for number in range(4)]
    assert compile_grammar(choice("first"), vocabulary(), cache=cache) is not first
    assert compile_grammar(choice("3"), vocabulary(), cache=cache) is kept[3]
    large = choice(*(f"{number:04}" for number in range(3000)))
    compiled = compile_grammar(large, vocabulary(), cache=cache)
    assert compile_grammar(large, vocabulary(), cache=cache) is not compiled


def test_nothing_finite_and_nothing_at_all() -> None:
    for schema in ({"enum": ["a"], "const": "b"}, {"type": "integer", "minimum": 2, "maximum": 1},
                   {"anyOf": [False, False]}, {"type": "object", "required": ["a"],
                    "additionalProperties": False}, {"type": "string", "enum": [1]}):  # fmt: skip
        with pytest.raises(
            InvalidRequestError,
            match="^s( at /enum)? (cannot be|allows)|^s: no finite",
        ):
            compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())


def test_a_mask_that_takes_long_is_the_last_of_its_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences of a step wait for it: 128 answers to one grammar may not each take so long."""
    compiled = compile_grammar(Regex(param="r", pattern="[ab]{9}"), vocabulary())
    slow, other = compiled.constraint(), compiled.constraint()
    compiled.check_pace("r", n=128)
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_MASK_S", 0.0)
    allowed(slow, vocabulary())
    assert slow.error is not None and "takes longer than the limit of" in slow.error
    monkeypatch.undo()
    allowed(other, vocabulary())
    assert other.error == slow.error
    with pytest.raises(InvalidRequestError, match="r: the grammar is too complex"):
        compiled.check_pace("r")


def test_a_token_that_takes_long_is_the_last_of_its_grammar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop waits for it."""
    compiled = compile_grammar(Regex(param="r", pattern="[ab]{9}"), vocabulary())
    slow, other = compiled.constraint(), compiled.constraint()
    token_id = int(allowed(slow, vocabulary())[0])
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_CONSUME_S", 0.0)
    slow.accept([token_id])
    assert slow.error is not None and "takes longer than the limit of" in slow.error
    monkeypatch.undo()
    allowed(other, vocabulary())
    assert other.error is not None and "takes longer than the limit of" in other.error


def test_an_answer_may_not_take_long_for_each_of_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = compile_grammar(Regex(param="r", pattern="[ab]{999}"), vocabulary())
    slow, other = compiled.constraint(), compiled.constraint()
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_MASK_S", 0.001)
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_TOKEN_S", 0.0)
    num_tokens = 0
    while slow.error is None:
        slow.accept([int(allowed(slow, vocabulary())[0])])
        num_tokens += 1
    assert num_tokens > 1 and "for each of many" in slow.error
    monkeypatch.undo()
    allowed(other, vocabulary())
    assert other.error is not None


@pytest.mark.parametrize("num_optional", [2000, 5000])
def test_what_takes_long_for_each_token_is_refused(num_optional: int) -> None:
    """A mask once its states are there, and the token behind it, for which the event loop waits; on
    a busy machine a mask's first states may take too long before that is known."""
    slow = Grammar(param="c", text="root ::= " + '"a"? ' * num_optional)
    with pytest.raises(InvalidRequestError, match="^c is too complex: .* limit is (5|100) ms"):
        compile_grammar(slow, vocabulary())


@pytest.mark.parametrize("num_optional", [1000, 2000])
def test_a_blow_up_behind_the_trial_ends_soon(num_optional: int) -> None:
    pattern = "[b-d]{60}" + "a?" * num_optional
    compiled = compile_grammar(Regex(param="r", pattern=pattern), vocabulary())
    constraint, longest_s = compiled.constraint(), 0.0
    for _ in range(60):
        began_s = time.thread_time()
        choices = allowed(constraint, vocabulary())
        longest_s = max(longest_s, time.thread_time() - began_s)
        if constraint.error is not None:
            break
        constraint.accept([int(choices[0])])
    assert constraint.error is not None
    assert "too many expressions" in constraint.error or "longer than the limit" in constraint.error
    assert longest_s < 0.5  # it took a second before, and again for each answer


def test_choices_share_what_masks_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.text.grammar.MAX_STEP_S", 1e-6)
    compiled = compile_grammar(Regex(param="r", pattern="[ab]{9}"), vocabulary())
    compiled.check_pace("r")
    with pytest.raises(
        InvalidRequestError, match="r is too complex for 2 answers at once"
    ) as caught:
        compiled.check_pace("r", n=2)
    assert caught.value.param == "n"


def test_what_takes_much_memory_is_refused() -> None:
    spec = Regex(param="r", pattern="a?" * 9999)  # 20 KB of text make 190 MB
    with pytest.raises(InvalidRequestError, match="^r is too complex: compiled, it takes .* MB"):
        compile_grammar(spec, vocabulary())


def test_what_takes_some_memory_is_not_kept() -> None:
    cache = GrammarCache()
    spec = Grammar(param="r", text='start: "' + "a" * 60_000 + '"')
    compiled = compile_grammar(spec, vocabulary(), cache=cache)
    assert compiled.num_bytes > 2**23 and cache.get(grammar.spec_key(spec)) is None


@pytest.mark.parametrize(
    "pattern", ["(a|b)*a(a|b){14}c", "(.*a.{12}){12}", r"\p{L}{50}", "(a{100}){100}", ".{0,19000}"]
)
def test_what_a_grammar_takes_is_counted(pattern: str) -> None:
    """With the states that its answers add; where only this thread allocates."""
    compile_grammar(choice("x"), vocabulary())
    before = used_bytes()
    compiled = compile_grammar(Regex(param="r", pattern=pattern), vocabulary())
    for seed in range(20):
        rng, constraint = random.Random(seed), compiled.constraint()
        for _ in range(60):
            if constraint.error is not None or constraint.is_finished:
                break
            choices = allowed(constraint, vocabulary())
            constraint.accept([int(choices[rng.randrange(len(choices))])])
    measure_all()
    assert used_bytes() - before < 1.5 * compiled.num_bytes + 2**18


def test_a_grammar_is_kept_no_longer_once_its_states_take_much() -> None:
    cache = GrammarCache()
    spec, other = Regex(param="r", pattern="(.*a.{12}){12}"), choice("x")
    compiled = compile_grammar(spec, vocabulary(), cache=cache)
    compile_grammar(other, vocabulary(), cache=cache)
    assert cache.get(grammar.spec_key(spec)) is compiled
    rng = random.Random(5)
    for _ in range(20):
        constraint = compiled.constraint()
        for _ in range(60):
            choices = allowed(constraint, vocabulary())
            if constraint.error is not None:
                break
            constraint.accept([int(choices[rng.randrange(len(choices))])])
    compile_grammar(choice("y"), vocabulary(), cache=cache)
    assert compiled.num_bytes > 2**23
    assert cache.get(grammar.spec_key(other)) is not None
    assert cache.get(grammar.spec_key(spec)) is None


def test_all_grammars_in_use_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    running = compile_grammar(Regex(param="r", pattern="[ab]{9}"), vocabulary()).constraint()
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_ALL_BYTES", 0)
    with pytest.raises(QueueFullError, match="take more than .* MB, try again in 1 s"):
        compile_grammar(choice("x"), vocabulary())
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_UNMEASURED_S", 0.0)
    allowed(running, vocabulary())
    assert running.error is not None and "have more states than their memory of" in running.error
    monkeypatch.undo()
    compile_grammar(choice("x"), vocabulary())


def test_a_grammar_whose_states_are_of_no_use_is_let_go() -> None:
    cache = GrammarCache()
    spec = Regex(param="r", pattern="[b-d]{60}" + "a?" * 2000)
    compiled = compile_grammar(spec, vocabulary(), cache=cache)
    constraint = compiled.constraint()
    while constraint.error is None:
        choices = allowed(constraint, vocabulary())
        if constraint.error is None:
            constraint.accept([int(choices[0])])
    assert cache.get(grammar.spec_key(spec)) is None
    with pytest.raises(InvalidRequestError, match="an answer to the same grammar has failed"):
        compiled.constraint()
