"""What a client of the Responses API makes of a stream: its events, and the items they build."""

from __future__ import annotations

import json
from typing import Any

from tests.api.fakes import Server

RESPONSES = "/v1/responses"
Event = dict[str, Any]


def parse(reply: bytes) -> list[Event]:
    """The events of a stream; each names its type twice and has the next number."""
    *frames, rest = reply.decode().split("\n\n")
    assert rest == ""
    events = []
    for frame in (frame for frame in frames if not frame.startswith(":")):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def stream(server: Server, body: dict[str, Any]) -> list[Event]:
    status, headers, reply = server.request("POST", RESPONSES, {**body, "stream": True})
    assert status == 200, reply
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    return parse(reply)


def built(events: list[Event]) -> list[dict[str, Any]]:
    """The items of an answer as its deltas have them, held against what is said when they end."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind, place = event["type"].removeprefix("response."), event.get("output_index")
        if kind == "output_item.added":
            assert place == len(items)
            items.append(event["item"])
        if place is None:
            continue
        item = items[place]
        assert event.get("item_id", item["id"]) == item["id"]
        where = item["summary" if "summary_index" in event else "content"] if "part" in event or (
            "content_index" in event or "summary_index" in event
        ) else []  # fmt: skip
        if kind.endswith("_part.added"):
            where.append(event["part"])
        elif kind.endswith("_part.done"):
            assert where == [event["part"]]
        elif kind == "output_text.delta":
            where[0]["text"] += event["delta"]
            where[0]["logprobs"] += event["logprobs"]
        elif kind in ("reasoning_text.delta", "reasoning_summary_text.delta"):
            where[0]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done", "reasoning_summary_text.done"):
            assert where[0]["text"] == event["text"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
        elif kind == "custom_tool_call_input.delta":
            item["input"] += event["delta"]
        elif kind == "custom_tool_call_input.done":
            assert item["input"] == event["input"]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"]
    return items


def plain(items: list[dict[str, Any]], response_id: str) -> list[dict[str, Any]]:
    """Items without what differs from one answer to the next."""
    call_ids: dict[str, str] = {}
    found = []
    for item in items:
        item = {**item, "id": item["id"].replace(response_id.removeprefix("resp_"), "")}
        if "call_id" in item:
            item["call_id"] = call_ids.setdefault(item["call_id"], f"call {len(call_ids)}")
        found.append(item)
    return found
