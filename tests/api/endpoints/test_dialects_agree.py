"""One answer in every dialect: the same parts, however they are cut, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pyserve.api.endpoints import chat_job, completions
from pyserve.api.endpoints.openai import make_job
from pyserve.api.generation.job import Job
from pyserve.text.parts import (
    Content,
    Part,
    Reasoning,
    ToolCall,
    content_of,
    reasoning_of,
    tool_calls_of,
)
from tests.api.fakes import Server, run_server
from tests.api.message_talk import events, put_together
from tests.api.response_talk import built, stream
from tests.api.tool_talk import streamed as chat_streamed
from tests.text.tool_parsers.answers import some_cuts

HI = [{"role": "user", "content": "hi"}]
THOUGHT, SAID, ARGUMENTS = 'So "it" \u2028 is.', "Hello,\n é 漢!", '{"city": "Paris", "n": [1, {}]}'
CALLS = [("get", ARGUMENTS), ("now", "{}")]
Said = tuple[str, str, list[tuple[str, str]]]  # thinking, text, calls
NUM_CUTS = 12


class Says:
    """Gives these parts at the end of an answer, one for each wake-up as far as there are any."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def push(self, content: Content) -> Sequence[Part]:
        return [self._parts.pop(0)] if len(self._parts) > 1 else ()

    def flush(self) -> Sequence[Part]:
        return self._parts


@pytest.fixture(scope="module")
def server(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder) as server:
        server.play("Hello world, how are you?", burst=4)
        yield server


def cuts() -> Iterator[list[Part]]:
    found = zip(*(some_cuts(text, NUM_CUTS, seed) for seed, text in
                  enumerate((THOUGHT, SAID, ARGUMENTS))), strict=True)  # fmt: skip
    for thought, said, arguments in found:
        yield [
            *(Reasoning(piece) for piece in thought if piece),
            *(Content(piece) for piece in said if piece),
            ToolCall(0, "call-1", "get"),
            *(ToolCall(0, arguments=piece) for piece in arguments if piece),
            ToolCall(1, "call-2", "now", "{}"),
        ]


def of_chat(server: Server, is_streamed: bool) -> Said:
    if is_streamed:
        (choice,) = chat_streamed(server, messages=HI, tools=None)
        frames = server.frames("/v1/chat/completions", {"messages": HI})
        thought = "".join(f["choices"][0]["delta"].get("reasoning") or "" for f in frames)
    else:
        message = server.post("/v1/chat/completions", {"messages": HI})["choices"][0]["message"]
        choice, thought = message, message["reasoning"]
    functions = [call["function"] for call in choice["tool_calls"]]
    return thought, choice["content"], [(f["name"], f["arguments"]) for f in functions]


def of_response(server: Server, is_streamed: bool) -> Said:
    body = {"input": HI, "store": False}
    items = (
        built(stream(server, body)) if is_streamed else server.post("/v1/responses", body)["output"]
    )
    of = {kind: [i for i in items if i["type"] == kind] for kind in ("reasoning", "message")}
    texts = ["".join(p["text"] for item in items for p in item["content"]) for items in of.values()]
    calls = [(i["name"], i["arguments"]) for i in items if i["type"] == "function_call"]
    return texts[0], texts[1], calls


def of_message(server: Server, is_streamed: bool) -> Said:
    body = {"messages": HI, "max_tokens": 100, "thinking": {"type": "adaptive"}}
    if is_streamed:
        reply = server.request("POST", "/v1/messages", {**body, "stream": True})[2]
        blocks = put_together(events(reply))["content"]
    else:
        blocks = server.post("/v1/messages", body)["content"]
    thought = "".join(b["thinking"] for b in blocks if b["type"] == "thinking")
    text = "".join(b["text"] for b in blocks if b["type"] == "text")
    calls = [(b["name"], json.dumps(b["input"])) for b in blocks if b["type"] == "tool_use"]
    return thought, text, calls


def of_text(server: Server, is_streamed: bool) -> Said:
    """Of /v1/completions, which has nothing but text."""
    if not is_streamed:
        return "", server.post("/v1/completions", {"prompt": "hi"})["choices"][0]["text"], []
    frames = server.frames("/v1/completions", {"prompt": "hi"})
    return "", "".join(frame["choices"][0]["text"] for frame in frames), []


@pytest.mark.parametrize("of", [of_text, of_chat, of_response, of_message])
def test_every_cut(
    server: Server, monkeypatch: pytest.MonkeyPatch, of: Callable[[Server, bool], Said]
) -> None:
    said: Sequence[Part] = ()

    async def make(*args: Any, **kwargs: Any) -> Job:
        job = await make_job(*args, **kwargs)
        return msgspec.structs.replace(job, make_stage=lambda: Says(said))

    for module in (chat_job, completions):
        monkeypatch.setattr(module, "make_job", make)
    for parts in cuts():
        said = parts if of != of_text else [part for part in parts if isinstance(part, Content)]
        calls = [(call.name or "", call.arguments) for call in tool_calls_of(said)]
        expected = reasoning_of(said), content_of(said), calls
        assert expected in ((THOUGHT, SAID, CALLS), ("", SAID, []))
        assert of(server, True) == of(server, False) == expected
