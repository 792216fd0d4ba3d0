"""Requests with tools, a template that shows them, and answers put together as clients do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tests.api.fakes import Server, make_tokenizer_folder

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
OF_TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }}]{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
)
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def with_template(folder: Path, source: str) -> Path:
    """The tokenizer of the other tests, with a template and with markers as special tokens."""
    make_tokenizer_folder(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": source}))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    markers = ("<tool_call>", "</tool_call>", "<|unused|>")
    backend.add_special_tokens([AddedToken(token, special=True) for token in markers])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "tools": TOOLS, "max_tokens": 400, **fields}


def streamed(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a streamed answer, put together as clients do."""
    found: dict[int, dict[str, Any]] = {}
    for frame in server.frames(CHAT, ask(**fields)):
        for choice in frame["choices"]:
            whole = found.setdefault(choice["index"], {"content": "", "tool_calls": []})
            delta = choice["delta"]
            whole["content"] += delta.get("content") or ""
            for piece in delta.get("tool_calls", ()):
                calls = whole["tool_calls"]
                if piece["index"] == len(calls):
                    call = {"id": piece["id"], "type": piece["type"]}
                    calls.append({**call, "function": {**piece["function"]}})
                    assert call["id"] and piece["function"]["name"]
                else:
                    assert set(piece) == {"index", "function"}
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            if choice["finish_reason"]:
                whole["finish_reason"] = choice["finish_reason"]
    return [found[index] for index in sorted(found)]


def wholly(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The same of a whole answer."""
    answer = server.post(CHAT, ask(**fields))
    found = []
    for choice in answer["choices"]:
        message = choice["message"]
        if "tool_calls" in message and not message["content"]:
            assert message["content"] is None
        found.append(
            {
                "content": message["content"] or "",
                "tool_calls": message.get("tool_calls", []),
                "finish_reason": choice["finish_reason"],
            }
        )
    return found


def plain(choices: list[dict[str, Any]]) -> list[Any]:
    return [
        (
            choice["content"],
            [(call["function"]["name"], call["function"]["arguments"])
             for call in choice["tool_calls"]],
            choice["finish_reason"],
        )
        for choice in choices
    ]  # fmt: skip


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
