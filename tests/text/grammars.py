"""Vocabularies, and answers under random logits, for the tests of structured outputs."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyserve.client import Constraint
from pyserve.config import DEMO_MODEL
from pyserve.text.grammar import Spec, compile_grammar
from pyserve.text.grammar_vocabulary import Vocabulary
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer

PADDING = 37  # ids of the model beyond the tokenizer's


@cache
def vocabulary(folder: Path = DEMO_MODEL) -> Vocabulary:
    tokenizer = Tokenizer.from_folder(folder)
    eos = GenerationDefaults.from_folder(folder).eos_token_ids or (tokenizer.eos_token_id,)
    return Vocabulary(
        tokenizer,
        vocab_size=tokenizer.vocab_size + PADDING,
        eos_token_ids=[token_id for token_id in eos if token_id is not None],
    )


def allowed(constraint: Constraint, vocab: Vocabulary) -> NDArray[np.int64]:
    """Ids whose bits are set, in order, those beyond the vocabulary too."""
    words = np.zeros((vocab.vocab_size + 31) // 32, np.int32)
    constraint.fill_bitmask(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def answer(
    constraint: Constraint, vocab: Vocabulary, rng: random.Random, max_tokens: int
) -> tuple[list[int], bool]:
    """Tokens without EOS, each drawn with equal chance, and whether the answer has ended.

    EOS is one token of many, so from half of max_tokens on it is taken wherever it may come.
    """
    token_ids: list[int] = []
    for _ in range(max_tokens):
        choices = allowed(constraint, vocab)
        assert constraint.error is None, constraint.error
        assert len(choices) and choices[-1] < vocab.tokenizer.vocab_size
        token_id = int(choices[rng.randrange(len(choices))])
        if len(token_ids) > max_tokens // 2 or rng.random() < 0.3:
            ending = np.intersect1d(choices, vocab.eos_token_ids)
            token_id = int(ending[0]) if len(ending) else token_id
        constraint.accept([token_id])
        assert constraint.error is None, constraint.error
        if token_id in vocab.eos_token_ids:
            return token_ids, True
        token_ids.append(token_id)
        if constraint.is_finished:
            return token_ids, True
    return token_ids, False


def text_of(spec: Spec, seed: int = 0, max_tokens: int = 200) -> str | None:
    """An answer of the demo model's vocabulary; None where it has not ended."""
    vocab = vocabulary()
    constraint = compile_grammar(spec, vocab).constraint()
    token_ids, has_ended = answer(constraint, vocab, random.Random(seed), max_tokens)
    if not has_ended:
        return None
    return vocab.tokenizer.decode(token_ids, skip_special_tokens=False)
