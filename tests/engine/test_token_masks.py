"""allowed_token_ids and bad_words: what they forbid, alone, together and beside a constraint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from pyserve.client import SequenceRequest
from pyserve.engine.masks import bitmask_words
from pyserve.engine.token_masks import AllowedTokens, BadWords, constraint_of
from pyserve.errors import InvalidRequestError
from pyserve.params import SamplingParams
from tests.engine.constraints import Rule, Scripted, always, windows
from tests.engine.driver import Driver
from tests.engine.fake_runner import ALL_TOKENS, VOCAB_SIZE, expected_tokens, make_engine

WORDS = ((7,), (1, 2), (1, 2, 3), (4, 4), (5, 1, 2, 9))


def allowed_by(constraint: object, vocab_size: int = VOCAB_SIZE) -> set[int]:
    """The tokens of the mask that it fills, over whatever was there before."""
    words = np.full(bitmask_words(vocab_size), 0x5A5A5A5A, np.int32)
    constraint.fill_bitmask(words)  # type: ignore[attr-defined]
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return {int(token_id) for token_id in np.flatnonzero(bits) if token_id < vocab_size}


def banned_after(output: Sequence[int], words: Sequence[Sequence[int]] = WORDS) -> set[int]:
    """By the definition: the last token of each word whose others end the output."""
    return {
        word[-1]
        for word in words
        if len(output) >= len(word) - 1
        and list(output[len(output) - len(word) + 1 :]) == list(word[:-1])
    }


def allowed_beside(
    params: SamplingParams, constraint: Scripted | None, output: Sequence[int]
) -> set[int]:
    """What is left by all that a sequence is held to."""
    allowed = set(params.allowed_token_ids or ALL_TOKENS) - banned_after(output, params.bad_words)
    beside = None if constraint is None else constraint.rule(output)
    return allowed if beside is None else allowed & set(beside)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 1000])
def test_allowed_tokens_and_no_others(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    token_ids = rng.sample(range(vocab_size), -(-vocab_size // 3))
    constraint = AllowedTokens((*token_ids, token_ids[0]), vocab_size)
    assert not constraint.is_free and not constraint.is_finished
    for _ in range(2):
        assert allowed_by(constraint, vocab_size) == set(token_ids)
        constraint.accept(token_ids[:2])


def test_a_bad_word_may_not_be_completed() -> None:
    rng = random.Random(0)
    constraint = BadWords(WORDS)
    output: list[int] = []
    seen: set[int] = set()
    for _ in range(3000):
        if output and rng.random() < 0.3:
            num_tokens = rng.randrange(min(len(output), 4) + 1)
            constraint.rollback(num_tokens)
            del output[len(output) - num_tokens :]
        else:
            token_ids = rng.choices(range(1, 6), k=rng.randrange(3))
            constraint.accept(token_ids)
            output += token_ids
        assert not constraint.is_free
        banned = banned_after(output)
        assert allowed_by(constraint) == ALL_TOKENS - banned
        seen |= banned
    assert seen == {7, 2, 3, 4, 9}


def test_words_of_several_tokens_need_a_mask_only_where_one_could_end() -> None:
    constraint = BadWords(WORDS[1:])
    assert constraint.is_free
    constraint.accept([1])
    assert not constraint.is_free and allowed_by(constraint) == ALL_TOKENS - {2}
    constraint.accept([3])
    assert constraint.is_free
    constraint.rollback(1)
    assert not constraint.is_free


def test_what_asks_for_nothing_is_no_constraint() -> None:
    assert constraint_of(SamplingParams(max_tokens=1), None, VOCAB_SIZE) is None
    scripted = Scripted(always(1))
    assert constraint_of(SamplingParams(max_tokens=1), scripted, VOCAB_SIZE) is scripted


@pytest.mark.parametrize("depth", [0, 1])
def test_sequences_are_held_to_both_and_to_a_constraint_beside_them(depth: int) -> None:
    driver = Driver(make_engine(), depth)
    rules: list[Rule] = []
    for number in range(6):
        params = SamplingParams(
            max_tokens=60, seed=number, bad_words=WORDS if number % 3 else (),
            allowed_token_ids=(1, 2, 3, 4, 5, 7) if number % 2 else None,
        )  # fmt: skip
        constraint = Scripted(windows(VOCAB_SIZE, 40)) if number > 3 else None
        driver.submit([number], params, constraint)
        rules.append(partial(allowed_beside, params, constraint))
    driver.drain()
    for number, (reader, rule) in enumerate(zip(driver.readers, rules, strict=True)):
        if number > 3 and reader.error is not None:  # they have nothing in common after this
            assert not rule(reader.output) and "contradict each other" in str(reader.error)
        else:
            assert len(reader.output) == 60
            assert reader.output == expected_tokens(reader.prompt, reader.params, rule)


def test_an_end_that_is_not_allowed_does_not_come() -> None:
    driver = Driver(make_engine(), 1)
    params = SamplingParams(
        max_tokens=50, seed=0, allowed_token_ids=(3, 4), stop_token_ids=tuple(range(5, 60))
    )
    reader = driver.submit([1], params)
    driver.drain()
    assert reader.finish_reason == "length" and set(reader.output) == {3, 4}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"allowed_token_ids": (1, VOCAB_SIZE)}, "allowed_token_ids"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"bad_words": ((1,), (2, VOCAB_SIZE))}, "bad_words"),
        ({"bad_words": ((-1, 2),)}, "bad_words"),
    ],
)
def test_ids_that_the_model_has_not_are_refused(fields: dict[str, tuple[int]], name: str) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=f"{name} holds token id") as caught:
        engine.add(SequenceRequest([1], SamplingParams(max_tokens=2, **fields)))  # type: ignore[arg-type]
    assert caught.value.param == name and engine.num_seqs == 0
    engine.check_invariants()
