from __future__ import annotations

import json
import random

import numpy as np
import pytest
from llguidance import LLParserLimits

from pyserve.client import Constraint
from pyserve.constraints import all_of
from pyserve.errors import InvalidRequestError
from pyserve.text import grammar, grammar_matcher
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.grammar import (
    Choice,
    Compiled,
    Grammar,
    GrammarCache,
    JsonSchema,
    Regex,
    Spec,
    compile_grammar,
)
from pyserve.text.grammar_constraint import FreeUntil, GrammarConstraint
from pyserve.text.grammar_vocabulary import Vocabulary
from pyserve.text.reasoning import ReasoningParser
from pyserve.text.thinking_budget import ThinkingBudget
from pyserve.text.tokenizer import Tokenizer
from tests.text.grammars import PADDING, allowed, answer, vocabulary

OBJECT = JsonSchema(
    param="s",
    schema={
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "é": {"type": "integer"}},
        "required": ["name", "é"],
        "additionalProperties": False,
    },
)


def make(spec: Spec, free_until: FreeUntil | None = None) -> GrammarConstraint:
    return compile_grammar(spec, vocabulary()).constraint(free_until=free_until)


def ids(text: str) -> list[int]:
    return vocabulary().tokenizer.encode_inner(text)


def state(constraint: Constraint) -> tuple[object, ...]:
    free, finished, error = constraint.is_free, constraint.is_finished, constraint.error
    return free, finished, error, tuple(allowed(constraint, vocabulary()))


def test_it_is_a_constraint() -> None:
    constraint: Constraint = make(OBJECT)
    assert (constraint.is_free, constraint.is_finished, constraint.error) == (False, False, None)


def test_every_kind_of_tokenizer_writes_what_is_asked_for(tokenizer: Tokenizer) -> None:
    """Also what has no token of its own, in tokenizers with tokens for bytes."""
    if tokenizer.decode(tokenizer.encode_inner('{"'), skip_special_tokens=False) != '{"':
        pytest.skip("has no tokens for JSON")
    eos = min(tokenizer.special_token_ids)
    vocab = Vocabulary(
        tokenizer, vocab_size=tokenizer.vocab_size + PADDING, eos_token_ids=[eos, -1, 10**9]
    )
    compiled = compile_grammar(OBJECT, vocab)
    rng = random.Random(1)
    for _ in range(5):
        token_ids, has_ended = answer(compiled.constraint(), vocab, rng, 300)
        assert has_ended
        assert not tokenizer.special_token_ids & set(token_ids)
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
        assert json.loads(text).keys() == {"name", "é"}


@pytest.mark.parametrize("extra", range(33))
def test_all_words_are_written_whatever_the_size_of_the_vocabulary(extra: int) -> None:
    tokenizer = vocabulary().tokenizer
    vocab = Vocabulary(tokenizer, vocab_size=tokenizer.vocab_size + extra, eos_token_ids=[0])
    constraint = compile_grammar(Choice(param="c", texts=["a"]), vocab).constraint()
    words = np.full((vocab.vocab_size + 31) // 32 + 1, 0x5A5A5A5A, np.int32)
    constraint.fill_bitmask(words[:-1])
    assert words[-1] == 0x5A5A5A5A
    bits = np.flatnonzero(np.unpackbits(words[:-1].view(np.uint8), bitorder="little"))
    assert [tokenizer.decode([int(i)], skip_special_tokens=False) for i in bits] == ["a"]


@pytest.mark.parametrize("tokens", ["<[*]>", "<[0-9999]>", "<[^5]>", "<[{padded}]>", "<[5,]>"])
def test_a_grammar_names_only_tokens_that_have_a_text(tokens: str) -> None:
    tokens = tokens.format(padded=vocabulary().tokenizer.vocab_size)
    with pytest.raises(InvalidRequestError, match="^g: <.*must list ids of tokens"):
        make(Grammar(param="g", text=f"start: {tokens}"))


def test_a_grammar_names_tokens() -> None:
    constraint = make(Grammar(param="g", text='start: <[5,300]> "x"'))
    assert list(allowed(constraint, vocabulary())) == [5, 300]


def test_the_end_is_a_token_like_others() -> None:
    vocab = vocabulary()
    constraint = make(Regex(param="r", pattern="a|ab"))
    constraint.accept(ids("a"))
    eos = vocab.eos_token_ids[0]
    assert not constraint.is_finished
    assert eos in allowed(constraint, vocab)
    constraint.accept([eos])
    assert constraint.is_finished
    assert constraint.error is None
    assert set(allowed(constraint, vocab)) == set(vocab.eos_token_ids)
    constraint.accept([eos])  # a late one of ignore_eos
    assert constraint.error is None
    constraint.rollback(2)
    assert not constraint.is_finished
    constraint.accept(ids("b"))
    assert constraint.is_finished


@pytest.mark.parametrize("token_ids", [[-1], [2**31 - 1], [10**12]])
def test_a_number_that_is_no_token_ends_it_alone(token_ids: list[int]) -> None:
    compiled = compile_grammar(OBJECT, vocabulary())
    constraint, other = compiled.constraint(), compiled.constraint()
    constraint.accept(token_ids)
    assert constraint.error is not None
    assert "is not a token" in constraint.error
    assert other.error is None
    assert not constraint.is_finished


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    constraint = make(OBJECT)
    constraint.accept(ids("x"))
    assert constraint.error is not None
    assert constraint.error.startswith("the grammar does not allow the token")
    words = np.zeros((vocabulary().vocab_size + 31) // 32, np.int32)
    constraint.fill_bitmask(words)  # of a sequence that is about to fail
    constraint.accept(ids("{"))
    constraint.rollback(1)
    assert constraint.error is not None


def test_a_blow_up_in_the_middle_is_an_error() -> None:
    """Which compile and trial do not see: it begins after 40 characters."""
    text = 'start: /[a-z]/{80} "." BIG\nBIG: /(x?){8000}x{8000}/'
    constraint = make(Grammar(param="g", text=text))
    for token_id in ids("ab" * 40 + ".xxxx"):
        allowed(constraint, vocabulary())
        constraint.accept([token_id])
    assert constraint.error is not None
    assert "lexer" in constraint.error


@pytest.mark.parametrize(
    "spec",
    [OBJECT, Choice(param="c", texts=["yes", "yes and no", "no"]),
     Grammar(param="g", text='root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+ | root')],
    ids=["object", "choice", "grammar"],
)  # fmt: skip
def test_rolling_back_leads_to_the_same_place(spec: Spec) -> None:
    vocab = vocabulary()
    rng = random.Random(3)
    compiled = compile_grammar(spec, vocab)
    for _ in range(10):
        constraint = compiled.constraint()
        states = [state(constraint)]
        token_ids: list[int] = []
        for _ in range(40):
            if constraint.is_finished:
                break
            token_ids.append(int(rng.choice(allowed(constraint, vocab))))
            constraint.accept(token_ids[-1:])
            states.append(state(constraint))
        for _ in range(6):
            num_tokens = rng.randint(0, len(token_ids))
            constraint.rollback(num_tokens)
            kept = len(token_ids) - num_tokens
            assert state(constraint) == states[kept]
            constraint.accept(token_ids[kept:])
            assert state(constraint) == states[-1]


END = "</think>"
AB = Regex(param="r", pattern="[ab]{4}")


def texts_of(constraint: Constraint) -> set[str]:
    tokenizer = vocabulary().tokenizer
    return {
        tokenizer.decode([int(i)], skip_special_tokens=False)
        for i in allowed(constraint, vocabulary())
    }


def test_free_until_the_thinking_ends() -> None:
    vocab = vocabulary()
    constraint = make(AB, free_until=FreeUntil(ends=("</other>", END)))
    end = ids(END)
    assert constraint.is_free
    assert len(allowed(constraint, vocab)) >= vocab.vocab_size
    constraint.accept([*ids("I think </thin so"), *end[:-1]])
    assert constraint.is_free
    constraint.accept(end[-1:])
    assert not constraint.is_free
    first = state(constraint)
    assert texts_of(constraint)
    assert all(set(text) <= {"a", "b"} for text in texts_of(constraint))
    constraint.accept(ids("ab"))
    constraint.rollback(len(ids("ab")))
    assert state(constraint) == first
    constraint.accept(ids("ab"))
    constraint.rollback(len(ids("ab")) + 1)
    assert constraint.is_free
    constraint.accept(end[-1:])
    assert state(constraint) == first
    constraint.accept(ids("abba"))
    assert constraint.is_finished
    assert constraint.error is None


def test_what_ends_the_thinking_may_be_the_first_of_the_grammar() -> None:
    spec = Regex(param="r", pattern="<call>[ab]")
    free_until = FreeUntil(ends=(END,), next_ends=("<call>",))
    for text in ("thinking <call>", f"thinking {END}<call>"):
        constraint = make(spec, free_until=free_until)
        constraint.accept(ids(text))
        assert constraint.error is None
        assert texts_of(constraint) == {"a", "b"}


@pytest.mark.parametrize("start", ["<think>", "think:", "Hm"])
def test_an_answer_may_begin_with_thinking_or_without(start: str) -> None:
    free_until = FreeUntil(ends=(END,), starts=(start, "other"))
    at_once, thinks = make(AB, free_until=free_until), make(AB, free_until=free_until)
    begin = state(at_once)
    first_tokens = {ids(start)[0], ids("other")[0]}
    plain = set(allowed(make(AB), vocabulary()))
    assert set(allowed(at_once, vocabulary())) == plain | first_tokens
    at_once.accept(ids("ab"))
    assert state(at_once)[3] == tuple(rest_of("ab"))
    at_once.rollback(len(ids("ab")))
    assert state(at_once) == begin
    for token_id in ids(start):
        assert not thinks.is_free
        assert token_id in allowed(thinks, vocabulary())
        thinks.accept([token_id])
    assert thinks.is_free
    thinks.accept(ids("all right" + END))
    assert state(thinks)[3] == tuple(rest_of(""))
    num_tokens = len(ids(start)) + len(ids("all right" + END))
    thinks.rollback(num_tokens - 1)
    thinks.accept([*ids(start)[1:], *ids("all right" + END)])
    assert state(thinks)[3] == tuple(rest_of(""))
    thinks.rollback(num_tokens)
    assert state(thinks) == begin
    thinks.accept(ids("x"))
    assert thinks.error is not None


EOS = [vocabulary().eos_token_ids[0]]


@pytest.mark.parametrize("starts", [(), ("<think>", "other thoughts")])
@pytest.mark.parametrize("thought", ["", "all right", "so </th"])
@pytest.mark.parametrize("end", [END, "Here is my answer:"])  # the latter of several tokens
def test_an_end_within_free_text_closes_it(starts: tuple[str, ...], thought: str, end: str) -> None:
    """Also one that comes there again, in place of a token that was taken back."""
    constraint = make(AB, free_until=FreeUntil(ends=(end, "</other>"), starts=starts))
    constraint.accept([*ids("".join(starts[:1])), *ids(thought)])
    assert constraint.is_free and not constraint.is_end_void
    for _ in range(3):
        constraint.accept(EOS)
        for token_id in ids(end):
            assert not constraint.is_free and not constraint.is_finished
            assert list(allowed(constraint, vocabulary())) == [token_id]
            constraint.accept([token_id])
            assert not constraint.is_end_void
        assert state(constraint)[3] == tuple(rest_of(""))
        for token_id in reversed(ids(end)):
            constraint.rollback(1)
            assert list(allowed(constraint, vocabulary())) == [token_id]
        assert constraint.is_end_void
        constraint.rollback(1)
        assert constraint.is_free and not constraint.is_end_void
    constraint.accept([*EOS, *ids(end), *ids("abba")])
    assert constraint.is_finished and constraint.error is None


def test_an_end_within_free_text_is_one_where_nothing_need_follow() -> None:
    for spec, ends in ((Regex(param="r", pattern="[ab]*"), (END,)), (AB, ())):
        constraint = make(spec, free_until=FreeUntil(ends=ends, next_ends=("<call>",)))
        constraint.accept([*ids("all right"), *EOS])
        assert not constraint.is_end_void and constraint.error is None


def test_an_end_behind_free_text_is_the_grammar_s() -> None:
    constraint = make(Regex(param="r", pattern="[ab]+"), free_until=FreeUntil(ends=(END,)))
    constraint.accept([*ids("x" + END), *ids("ab"), *EOS])
    assert not constraint.is_end_void and constraint.is_finished and constraint.error is None


def test_a_budget_and_an_end_ask_for_the_same_marker() -> None:
    """Whatever of it has come when the budget is spent."""
    tokenizer = vocabulary().tokenizer
    parser = ReasoningParser("granite", tokenizer)
    closing = ids(parser.format.ends[0])
    assert len(closing) > 2
    detokenizer = Detokenizer(tokenizer, [5], skip_special_tokens=True, shown=parser.marker_ids)
    thought = ids("all right")
    for budget in range(len(thought), len(thought) + len(closing) + 3):
        both = all_of([
            ThinkingBudget(budget, lambda: parser.stage("open"), detokenizer, closing),
            make(AB, parser.free_until("open")),
        ])  # fmt: skip
        assert both is not None
        both.accept(thought)
        if budget > len(thought):
            both.accept(EOS)
            assert both.is_end_void
        for token_id in closing:
            assert list(allowed(both, vocabulary())) == [token_id]
            both.accept([token_id])
        both.accept(ids("abba"))
        assert both.is_finished and both.error is None


def rest_of(text: str) -> list[int]:
    """What may follow `text` in AB."""
    constraint = make(AB)
    constraint.accept(ids(text))
    return list(allowed(constraint, vocabulary()))


@pytest.mark.parametrize("behind", ["", "a", "ab", "\n\n", " \nb"])
def test_what_stands_behind_the_end_in_its_token_counts(behind: str, byte_level: Tokenizer) -> None:
    """White space there does not; a model writes it and no grammar expects it."""
    vocab = Vocabulary(byte_level, vocab_size=byte_level.vocab_size, eos_token_ids=[0])
    compiled = compile_grammar(Regex(param="r", pattern="[ab]{2}"), vocab)
    vocab.pieces[1] = f"k>{behind}".encode()
    constraint = compiled.constraint(free_until=FreeUntil(ends=("think>",)))
    constraint.accept([*byte_level.encode_inner("so thin"), 1])
    assert not constraint.is_free
    fresh = compiled.constraint()
    fresh.accept(byte_level.encode_inner(behind.strip()))
    assert list(allowed(constraint, vocab)) == list(allowed(fresh, vocab))
    assert constraint.error is None


def test_each_choice_goes_its_own_way() -> None:
    compiled = compile_grammar(Choice(param="c", texts=["yes", "no"]), vocabulary())
    first, second = compiled.constraint(), compiled.constraint()
    first.accept(ids("yes"))
    assert first.is_finished
    assert not second.is_finished
    second.accept(ids("no"))
    assert second.is_finished


def test_a_model_without_an_end_takes_no_grammar() -> None:
    vocab = Vocabulary(vocabulary().tokenizer, vocab_size=5000, eos_token_ids=[])
    with pytest.raises(InvalidRequestError, match="need a token that ends an answer"):
        compile_grammar(OBJECT, vocab)


HARD = "(a|b)*a(a|b){18}"  # its automaton has 2**19 states, of which no answer sees many


def run_on(compiled: Compiled, rng: random.Random, num_tokens: int) -> GrammarConstraint:
    constraint = compiled.constraint()
    ends = vocabulary().eos_token_ids
    for _ in range(num_tokens):
        choices = [i for i in allowed(constraint, vocabulary()) if i not in ends]
        if constraint.error is not None:
            break
        constraint.accept([int(choices[rng.randrange(len(choices))])])
    return constraint


def test_answers_to_one_grammar_do_not_use_up_what_they_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = LLParserLimits(max_lexer_states=2000, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    cache = GrammarCache()
    spec = Regex(param="r", pattern=HARD)
    compiled = compile_grammar(spec, vocabulary(), cache=cache)
    rng = random.Random(7)
    early = [compiled.constraint() for _ in range(3)]
    token_ids = ids("ab" * 30)
    for constraint in early:
        constraint.accept(token_ids)
    before = list(allowed(early[0], vocabulary()))
    while not compiled.is_exhausted:
        assert run_on(compiled, rng, 60).error is None
    for constraint in early:  # they go on, and back, as if nothing had been
        assert list(allowed(constraint, vocabulary())) == before
        constraint.accept(ids("ba"))
        constraint.rollback(len(ids("ba")))
        assert list(allowed(constraint, vocabulary())) == before
        assert constraint.error is None
    again = compile_grammar(spec, vocabulary(), cache=cache)
    assert again is not compiled
    assert not again.is_exhausted
    assert run_on(again, rng, 60).error is None


def test_what_is_too_complex_alone_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LLParserLimits(max_lexer_states=250, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    compiled = compile_grammar(Regex(param="r", pattern=HARD), vocabulary())
    constraint = run_on(compiled, random.Random(1), 2000)
    assert constraint.error is not None
    assert "too many states" in constraint.error
    other = run_on(compile_grammar(AB, vocabulary()), random.Random(1), 2)
    assert other.error is None


def test_no_answer_goes_on_alone_where_states_take_all_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = LLParserLimits(max_lexer_states=500, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    compiled = compile_grammar(Regex(param="r", pattern=HARD), vocabulary())
    rng = random.Random(7)
    monkeypatch.setattr(grammar_matcher, "MAX_ALL_BYTES", 0)
    monkeypatch.setattr(grammar_matcher, "MAX_UNMEASURED_S", 1.0)
    while (error := run_on(compiled, rng, 60).error) is None:
        pass
    assert "too many states" in error
