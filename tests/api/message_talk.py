"""What a client of Messages makes of a stream: its events, and the message they build."""

from __future__ import annotations

import json
from typing import Any


def events(sent: bytes) -> list[tuple[str, dict[str, Any]]]:
    assert sent.endswith(b"\n\n")
    found = []
    for frame in sent.decode().removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append((value.pop("type"), value))
    return found


def put_together(found: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The message of a stream, put together as Anthropic's client does; checks the order."""
    assert [name for name, _ in found[-2:]] == ["message_delta", "message_stop"]
    (name, start), *middle = found[:-2]
    assert name == "message_start"
    message: dict[str, Any] = start["message"]
    is_open, arguments = False, ""
    for name, data in middle:
        assert data["index"] == len(message["content"]) - (name != "content_block_start")
        assert is_open == (name != "content_block_start")
        if name == "content_block_start":
            message["content"].append(data["content_block"])
            is_open, arguments = True, ""
        elif name == "content_block_stop":
            is_open = False
            if arguments:
                message["content"][-1]["input"] = json.loads(arguments)
        else:
            delta = data["delta"]
            kind = delta.pop("type")
            ((field, text),) = delta.items()
            if kind == "input_json_delta":
                arguments += text
            else:
                message["content"][-1][field] += text
    assert not is_open
    message |= found[-2][1]["delta"] | {"usage": found[-2][1]["usage"]}
    return message
