"""The table of tokens: its slices change how long a mask takes, not the mask."""

from __future__ import annotations

import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from pyserve.errors import CheckpointError
from pyserve.text.grammar import Grammars, JsonSchema, Regex, Spec, compile_grammar
from pyserve.text.grammar_vocabulary import MAX_FORCED_TEXTS, SLICES, Vocabulary, _Tokens
from tests.text.grammars import vocabulary

PATTERNS = [
    "[a-z ]{2,40}", "[a-z]{30}", "[a-zA-Z0-9_-]{1,64}", "[^,]{20}x", "(ab|c ){9}", r"\w*é",
]  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "id": {"type": "string", "pattern": "^[a-z]{3,9}$"},
        "any": {},
    },
    "required": ["name", "id", "any"],
}


@pytest.mark.parametrize(
    "spec",
    [JsonSchema(param="s", schema=SCHEMA), *(Regex(param="r", pattern=p) for p in PATTERNS)],
    ids=repr,
)
def test_masks_are_as_without_slices(spec: Spec) -> None:
    table = vocabulary().table()
    assert list(SLICES) != LLTokenizer.general_slices()
    text = compile_grammar(spec, vocabulary())._text
    for seed in range(6):
        rng = random.Random(seed)
        sliced, plain = LLMatcher(table, text), LLMatcher(table.with_slices([]), text)
        for _ in range(40):
            mask = sliced.compute_bitmask()
            assert mask == plain.compute_bitmask()
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
            token_id = int(rng.choice(np.flatnonzero(bits)))
            assert sliced.consume_token(token_id) and plain.consume_token(token_id)
            if sliced.is_stopped():
                break


def test_texts_that_are_forced_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = vocabulary()
    tokens = _Tokens(vocab.tokenizer, vocab.vocab_size, vocab.eos_token_ids)
    asked: list[str] = []
    encode = vocab.tokenizer.encode_inner

    def count(text: str) -> list[int]:
        asked.append(text)
        return encode(text)

    monkeypatch.setattr(vocab.tokenizer, "encode_inner", count)
    first, other = tokens('"name": "'), tokens('"age": ')
    assert tokens('"name": "') == first != other
    assert asked == ['"name": "', '"age": ']
    for number in range(MAX_FORCED_TEXTS):
        tokens(str(number))
    assert tokens('"name": "') == first and len(asked) == 3 + MAX_FORCED_TEXTS


def test_a_panic_over_the_tokens_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("assertion failed")

    monkeypatch.setattr("pyserve.text.grammar_vocabulary.LLTokenizer", panic)
    of_demo = vocabulary()
    fresh = Vocabulary(
        of_demo.tokenizer, vocab_size=of_demo.vocab_size, eos_token_ids=of_demo.eos_token_ids
    )
    with pytest.raises(CheckpointError, match=r"the tokens: cannot be used \(assertion failed\)"):
        Grammars(fresh).prepare()
