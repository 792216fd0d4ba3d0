"""How a reranker is shown a query and a document."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyserve.errors import ConfigError
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.score_template import ScoreTemplate
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import make_tokenizer_folder

OWN = (
    "{% for m in messages %}{% if m.role == 'system' %}I:{{ m.content }} {% elif m.role == 'query' "
    "%}Q:{{ m.content }} {% elif m.role == 'document' %}D:{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(make_tokenizer_folder(tmp_path / "model"))


def prompt(template: ScoreTemplate, tokenizer: Tokenizer, *texts: str | None) -> str:
    query, document, instruction = texts
    assert query is not None and document is not None
    ids = template.encode(query, document, instruction)
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_a_template_that_shows_both_is_taken(tokenizer: Tokenizer) -> None:
    own = ChatTemplate.load(tokenizer, override=OWN)
    for model_type in ("qwen3", "llama"):
        found = ScoreTemplate.find(own, tokenizer, model_type=model_type)
        assert prompt(found, tokenizer, "a?", "b", None) == "Q:a? D:b"
        assert prompt(found, tokenizer, "a?", "b", "judge") == "I:judge Q:a? D:b"
        written = "<|im_start|>x"
        assert prompt(found, tokenizer, written, "b", None) == f"Q:{written} D:b"
        assert found.encode(written, "b", None).count(1) == 0, "it stays text"


def test_a_template_for_chats_is_none(tokenizer: Tokenizer) -> None:
    """One that prints messages of any role, as this one does, too."""
    chats = ChatTemplate.load(tokenizer)
    with pytest.raises(ConfigError, match="--chat-template gives another"):
        ScoreTemplate.find(chats, tokenizer, model_type="llama")
    known = ScoreTemplate.find(chats, tokenizer, model_type="qwen3")
    text = prompt(known, tokenizer, "a?", "b", None)
    assert text.endswith(
        "<Query>: a?\n<Document>: b<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_the_token_of_an_answer_must_be_there(tokenizer: Tokenizer) -> None:
    assert tokenizer.ids_of(("a", "b")) == (tokenizer.token_to_id("a"), tokenizer.token_to_id("b"))
    with pytest.raises(ConfigError, match="has no token 'maybe', whose logit makes the score"):
        tokenizer.ids_of(("a", "maybe"))
