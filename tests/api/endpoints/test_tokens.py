"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.fakes import CONTEXT, MODEL, Server


def test_there_and_back(server: Server) -> None:
    for text in ("Hello world 😀 漢字", "", "x" * 5000):
        tokens = server.post("/tokenize", {"model": MODEL, "prompt": text})
        assert tokens["count"] == len(tokens["tokens"])
        assert tokens["max_model_len"] == CONTEXT and tokens["token_strs"] is None
        assert tokens["tokens"] == server.tokenizer.encode(text, add_special_tokens=True)
        assert server.post("/detokenize", {"tokens": tokens["tokens"]}) == {"prompt": text}


def test_messages_are_the_prompt_of_chat(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = server.post("/tokenize", {"messages": messages})["tokens"]
    server.post("/v1/chat/completions", {"messages": messages})
    assert tokens == server.engine.submitted[0].prompt


def test_special_tokens_are_kept(server: Server) -> None:
    assert server.post("/detokenize", {"tokens": [2]}) == {"prompt": "<|im_end|>"}


def test_ignored_fields_are_named(server: Server) -> None:
    _, headers, _ = server.request("POST", "/tokenize", {"prompt": "x", "foo": 1})
    assert headers["x-pyserve-ignored"] == "foo"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
def test_refusals(server: Server, path: str, body: dict[str, Any], status: int, param: str) -> None:
    assert server.error(path, body, status)["param"] == param
