"""Text that cannot fit is refused before all of it is tokenised; what may fit is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyserve.api.endpoints import prompts
from pyserve.errors import InvalidRequestError
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import CONTEXT, Server


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


class Counting:
    """Counts the characters that are tokenised."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.num_chars += len(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def count(self, text: str, *, param: str) -> int:
        self.num_chars += len(text)
        return self.tokenizer.count(text, param=param)


@pytest.mark.parametrize("text", ["word ", "x", "漢字", " ", "\n\t"])
def test_endless_text_is_given_up_early(tokenizer: Tokenizer, text: str) -> None:
    counting = Counting(tokenizer)
    endless = text * (1_000_000 // len(text))
    with pytest.raises(InvalidRequestError, match="context length is 4096 tokens.*at least"):
        prompts.encode(counting, endless, add_special_tokens=True, max_model_len=4096)  # type: ignore[arg-type]
    assert counting.num_chars <= 4 * prompts.PIECE_CHARS


@pytest.mark.parametrize("text", ["The quick brown fox ", "x", "漢字😀", " "])
def test_what_fits_is_never_refused(tokenizer: Tokenizer, text: str) -> None:
    long = text * (200_000 // len(text))
    exact = tokenizer.encode(long, add_special_tokens=False)
    got = prompts.encode(tokenizer, long, add_special_tokens=False, max_model_len=len(exact))
    assert got == exact


def test_every_road_is_bounded(server: Server) -> None:
    text = "word " * 400_000
    body: Any
    for path, body, param in (
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/completions", {"prompt": ["x", text]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}, "messages"),
    ):
        error = server.error(path, body)
        assert error["param"] == param and str(CONTEXT) in error["message"]
    for path, body in (
        ("/tokenize", {"prompt": text}),
        ("/detokenize", {"tokens": [80] * (2**20 + 1)}),
    ):
        error = server.error(path, body)
        assert str(prompts.MAX_TOKENIZE_CHARS) in error["message"]


def test_text_that_no_tokens_can_hold_is_not_tokenised(tokenizer: Tokenizer) -> None:
    counting = Counting(tokenizer)
    for text in ("x" * (prompts.MAX_TOKENIZE_CHARS + 1), "word " * 5_000_000):
        with pytest.raises(InvalidRequestError, match=f"4096 tokens: .* {len(text)} characters"):
            prompts.encode(counting, text, add_special_tokens=True, max_model_len=4096)  # type: ignore[arg-type]
    assert counting.num_chars == 0
    limit = prompts.CHARS_PER_TOKEN * 2**18
    prompts.check_chars(limit, max_model_len=2**18, param="prompt")
    with pytest.raises(InvalidRequestError, match=f"more than {limit}"):
        prompts.check_chars(limit + 1, max_model_len=2**18, param="prompt")


def test_the_tokens_of_all_sequences_are_bounded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "MAX_REQUEST_TOKENS", 100)
    path = "/v1/completions"
    error = server.error(path, {"prompt": [[80] * 13, [80] * 13], "n": 4, "temperature": 1})
    assert error["param"] == "n" and "26 prompt tokens times n 4" in error["message"]
    assert "100" in error["message"]
    for prompt in ([[80] * 51, [80] * 50], ["x y" * 20] * 6):
        assert server.error(path, {"prompt": prompt})["param"] == "prompt"
    assert server.engine.submitted == []
    server.post(path, {"prompt": [[80] * 13, [80] * 12], "n": 4, "temperature": 1})
    assert len(server.engine.submitted) == 8


def test_tokenize_may_exceed_the_context(server: Server) -> None:
    answer = server.post("/tokenize", {"prompt": "word " * 20_000})
    assert answer["count"] > CONTEXT
