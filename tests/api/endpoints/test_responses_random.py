"""Random bodies of /v1/responses: items, tools and choices that are nearly right. From a seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.api.fakes import run_server
from tests.api.response_talk import RESPONSES
from tests.api.tool_talk import CALL, OF_TOOLS, with_template

NOW = {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": True}
ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"type": "message", "role": "assistant", "status": "completed", "id": "msg_1",
     "content": [{"type": "output_text", "text": "x", "annotations": []}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}]},
    {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}", "namespace": "n"},
    {"type": "function_call_output", "call_id": "c1",
     "output": [{"type": "input_text", "text": "x"}]},
    {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "x"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": "x"},
    {"type": "web_search_call", "action": {"x": 1}},
]  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    NOW, {"type": "custom", "name": "patch", "format": {"type": "text"}},
    {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "now"}]},
    {"type": "mcp", "server_label": "x"},
]  # fmt: skip
CHOICES: list[Any] = [
    "auto", "none", "required", {"type": "function", "name": "now"},
    {"type": "custom", "name": "patch"},
    {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]},
]  # fmt: skip
OPTIONS: dict[str, Any] = {
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"},
    "include": ["message.output_text.logprobs"], "previous_response_id": "resp_1",
    "truncation": "auto", "background": True, "stream": True, "top_logprobs": 3,
    "instructions": "x",
}  # fmt: skip
JUNK: list[Any] = [
    None, True, 0, -1, 1.5, "", "x", "\0", "😀" * 50, [], {}, [None], {"type": "x"}, [[]],
    {"a": {"b": [1]}}, 10**30, "x" * 3000,
]  # fmt: skip
SHARE = 0.015  # of values that are junk, and of fields that are missing


def spoiled(rng: random.Random, value: Any) -> Any:
    if rng.random() < SHARE:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        kept = {key: spoiled(rng, item) for key, item in value.items() if rng.random() > SHARE}
        if rng.random() < SHARE:
            kept[rng.choice(["id", "type", "name", "content", "unknown", "role", "tools"])] = (
                rng.choice(JUNK)
            )
        return kept
    if isinstance(value, list):
        return [spoiled(rng, item) for item in value for _ in range(rng.choice([1, 1, 1, 2]))]
    return value


def make_body(rng: random.Random) -> Any:
    items = ITEMS[: rng.randint(1, len(ITEMS))]
    if rng.random() < 0.1:
        items = [*items, {"type": "item_reference", "id": "msg_" + "0" * 36}]
    body = {"input": items, "max_output_tokens": 4}
    body |= {name: value for name, value in OPTIONS.items() if rng.random() < 0.1}
    if rng.random() < 0.6:
        body["tools"] = [tool for tool in TOOLS if rng.random() < 0.7]
        if rng.random() < 0.5:
            body["tool_choice"] = rng.choice(CHOICES)
    return spoiled(rng, body)


@pytest.mark.parametrize("seed", range(2))
def test_random_bodies_get_a_named_error_or_an_answer(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    seen: Counter[int] = Counter()
    with run_server(
        with_template(tmp_path / "tiny", OF_TOOLS),
        enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3",
    ) as server:  # fmt: skip
        server.engine.info = replace(server.engine.info, max_model_len=4096)
        server.play(f"Hello {CALL}", burst=64)
        for _ in range(200):
            body = make_body(rng)
            path = rng.choice([RESPONSES, RESPONSES, f"{RESPONSES}/input_tokens"])
            status, _, reply = server.request("POST", path, body)
            seen[status] += 1
            assert status in (200, 400, 404), (body, reply)
            if status != 200:
                error = json.loads(reply)["error"]
                # In the client's names, not in those of the chat behind it.
                assert error["message"] and "messages[" not in f"{error['message']}{error['param']}"
        assert server.request("GET", "/health")[0] == 200
    assert seen[200] > 20 and seen[400] > 50, seen
