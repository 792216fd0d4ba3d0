"""A thinking budget over formats, openings and ways the thinking ends."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pyserve.client import Constraint
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content, content_of, reasoning_of
from pyserve.text.reasoning import FORMATS, Opening, ReasoningParser
from pyserve.text.thinking_budget import ThinkingBudget
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import make_tokenizer_folder

WORDS = 14  # of 32 tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = make_tokenizer_folder(tmp_path_factory.mktemp("budget") / "model")
    return Tokenizer.from_folder(folder)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def make(
    tokenizer: Tokenizer, budget: int, opening: Opening = "open", name: str = "deepseek_r1"
) -> tuple[ThinkingBudget, ReasoningParser]:
    parser = ReasoningParser(name, tokenizer)
    detokenizer = Detokenizer(tokenizer, [5, 6], skip_special_tokens=True, shown=parser.marker_ids)
    end_ids = encode(tokenizer, parser.format.ends[0])
    assert len(end_ids) > 1
    constraint = ThinkingBudget(budget, lambda: parser.stage(opening), detokenizer, end_ids)
    return constraint, parser


def only_allowed(constraint: Constraint) -> int:
    words = np.full(WORDS, -1, np.int32)
    constraint.fill_bitmask(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert bits.sum() == 1
    return int(bits.argmax())


def generate(constraint: ThinkingBudget, wanted: list[int]) -> list[int]:
    """What a model says that wants these tokens."""
    output: list[int] = []
    left = list(wanted)
    while left:
        output.append(left.pop(0) if constraint.is_free else only_allowed(constraint))
        constraint.accept(output[-1:])
        assert constraint.error is None and not constraint.is_finished
    return output


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "mistral", "granite", "seed_oss"])
@pytest.mark.parametrize("opening", ["open", "unsaid"])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_thinking_ends_behind_so_many_tokens(
    tokenizer: Tokenizer, name: str, opening: Opening, budget: int
) -> None:
    constraint, parser = make(tokenizer, budget, opening, name)
    start = encode(tokenizer, parser.format.starts[0]) if opening == "unsaid" else []
    thought = encode(tokenizer, "The quick 漢 fox jumps over the lazy dog, how are you?")
    end = encode(tokenizer, parser.format.ends[0])
    output = generate(constraint, start + thought)
    assert output == start + thought[:budget] + end + thought[budget:]
    assert constraint.is_free
    text = tokenizer.decode(output, skip_special_tokens=False)
    stage = parser.stage(opening)
    parts = [*stage.push(Content(text)), *stage.flush()]
    assert reasoning_of(parts) + parser.format.ends[0] + content_of(parts) in text
    assert reasoning_of(parts) == tokenizer.decode(thought[:budget], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("opening", "said"),
    [
        ("unsaid", "Hello, there is no thinking here at all."),
        ("closed", "<think> is a word of this answer."),
        ("open", "Short.</think>The quick brown fox jumps over the lazy dog, how are you?"),
        ("unsaid", "<think>No.</think>The quick brown fox jumps over the lazy dog, how are you?"),
    ],
)
def test_what_does_not_spend_its_budget_is_free(
    tokenizer: Tokenizer, opening: Opening, said: str
) -> None:
    constraint, _ = make(tokenizer, 20, opening)
    wanted = encode(tokenizer, said)
    assert generate(constraint, wanted) == wanted


def test_a_marker_that_the_model_has_begun_is_gone_on_with(tokenizer: Tokenizer) -> None:
    end = encode(tokenizer, "</think>")
    thought = encode(tokenizer, "fox")
    for begun in range(len(end)):
        constraint, _ = make(tokenizer, len(thought) + begun)
        output = generate(constraint, [*thought, *end[:begun], 7, 8])
        assert output == [*thought, *end, 7, 8]
        constraint, _ = make(tokenizer, len(thought) + begun + 1)
        output = generate(constraint, [*thought, *end[:begun], 7, 8])
        assert output == [*thought, *end[:begun], 7, *end, 8]


def test_taking_back_is_as_if_nothing_had_come(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    wanted = encode(tokenizer, "<think>The quick brown fox jumps</think>over the lazy dog.")
    for _ in range(100):
        budget = rng.randrange(12)
        constraint, _ = make(tokenizer, budget, "unsaid")
        output = generate(constraint, wanted)
        num_left = rng.randrange(len(output) + 1)
        constraint.rollback(len(output) - num_left)
        again, _ = make(tokenizer, budget, "unsaid")
        again.accept(output[:num_left])
        assert constraint.is_free == again.is_free
        assert constraint.is_free or only_allowed(constraint) == only_allowed(again)


def test_every_format_has_a_marker_that_closes_it(tokenizer: Tokenizer) -> None:
    for name in FORMATS:
        constraint, parser = make(tokenizer, 0, "open", name)
        generate(constraint, [7] * 3)
        assert constraint.is_free and parser.format.ends[0]
