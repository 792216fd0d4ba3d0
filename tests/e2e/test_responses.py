"""OpenAI's Responses API of the real server; the client libraries are in tests/clients."""

from __future__ import annotations

import json
from typing import Any

from tests.api.response_talk import RESPONSES, built, parse
from tests.e2e.conftest import Server
from tests.waiting import wait_until

ASKED: dict[str, Any] = {
    "instructions": "You answer questions about geography. " * 20, "temperature": 0,
    "input": "What is the capital of France?", "max_output_tokens": 32_000,
}  # fmt: skip


def test_an_answer_its_stream_and_its_prompt(server: Server) -> None:
    whole = server.json(RESPONSES, ASKED)
    (message,) = whole["output"]
    assert "Paris" in message["content"][0]["text"] and whole["status"] == "completed"
    body = json.dumps({**ASKED, "stream": True}).encode()
    status, reply = server.request("POST", RESPONSES, body)
    events = parse(reply)
    assert status == 200 and built(events)[0]["content"] == message["content"]
    counted = server.json(f"{RESPONSES}/input_tokens", ASKED)["input_tokens"]
    for usage in (whole["usage"], events[-1]["response"]["usage"]):
        assert usage["input_tokens"] == counted
    assert usage["input_tokens_details"]["cached_tokens"] >= 0.9 * counted  # of the second


def test_the_next_turn_begins_with_this_one(server: Server) -> None:
    first = server.json(RESPONSES, ASKED)
    before = first["usage"]["input_tokens"]
    more = {**ASKED, "input": "And of Spain?", "previous_response_id": first["id"]}
    said = [{"role": "user", "content": ASKED["input"]}, *first["output"]]
    told = {**ASKED, "input": [*said, {"role": "user", "content": "And of Spain?"}]}
    answers = [server.json(RESPONSES, body) for body in (more, told)]
    for answer in answers:
        assert answer["usage"]["input_tokens_details"]["cached_tokens"] >= 0.95 * before
    texts = {answer["output"][0]["content"][0]["text"] for answer in answers}
    assert len(texts) == 1


def test_the_background(server: Server) -> None:
    name = server.json(RESPONSES, {**ASKED, "background": True})["id"]

    def get() -> Any:
        status, reply = server.get(f"{RESPONSES}/{name}")
        assert status == 200
        return json.loads(reply)

    wait_until(lambda: get()["status"] == "completed", 30.0)
    assert "Paris" in get()["output"][0]["content"][0]["text"]
    assert server.request("DELETE", f"{RESPONSES}/{name}")[0] == 200
    assert server.get(f"{RESPONSES}/{name}")[0] == 404
