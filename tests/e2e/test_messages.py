"""Anthropic's dialect of the real server; its own SDKs and Claude Code are in tests/clients."""

from __future__ import annotations

import json
from typing import Any

from tests.api.message_talk import events, put_together
from tests.e2e.conftest import Server

PATH = "/v1/messages"
LONG = "You answer questions about geography. " * 20
ASKED: dict[str, Any] = {
    "max_tokens": 32_000, "system": LONG, "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}  # fmt: skip


def test_an_answer_its_stream_and_its_prompt(server: Server) -> None:
    whole = server.json(f"{PATH}?beta=true", ASKED)
    (text,) = whole["content"]
    assert "Paris" in text["text"] and whole["stop_reason"] == "end_turn"
    status, reply = server.request("POST", PATH, json.dumps({**ASKED, "stream": True}).encode())
    message = put_together(events(reply))
    assert status == 200 and message["content"] == whole["content"]
    prompt = {name: ASKED[name] for name in ("system", "messages")}
    counted = server.json(f"{PATH}/count_tokens", prompt)["input_tokens"]
    for usage in (whole["usage"], message["usage"]):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
    # The stream has come second.
    assert message["usage"]["cache_read_input_tokens"] >= 0.9 * counted


def test_the_next_turn_begins_with_this_one(server: Server) -> None:
    first = server.json(PATH, ASKED)
    turns = [
        *ASKED["messages"], {"role": "assistant", "content": first["content"]},
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And of Spain?"},
    ]  # fmt: skip
    usage = server.json(PATH, {**ASKED, "messages": turns})["usage"]
    said = first["usage"]
    before = said["input_tokens"] + said["cache_read_input_tokens"]
    assert usage["cache_read_input_tokens"] >= 0.95 * before


def test_an_error_is_anthropics(server: Server) -> None:
    status, reply = server.request("POST", PATH, b'{"messages":[],"max_tokens":1}')
    said = json.loads(reply)
    assert (status, said["type"]) == (400, "error")
    assert said["error"]["type"] == "invalid_request_error"
