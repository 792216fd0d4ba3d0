"""How long the event loop stands still under the largest request that each route takes.

The engine is the real one, but for the model. The client is a thread of the same process, and the
machine may be busy: the best of some tries counts.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.app import ROUTES
from pyserve.api.endpoints.messages_turns import hidden
from pyserve.api.http.bounds import MAX_FIELD_BYTES
from pyserve.api.wire.json_size import MAX_BODY_IDS, MAX_JSON_VALUES
from pyserve.api.wire.protocol import (
    MAX_ECHO_CHARS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PARTS,
    MAX_REQUEST_TOKENS,
    MAX_STOP_CHARS_IN_ALL,
    MAX_STOP_STRINGS,
    MAX_TEMPLATE_KWARGS,
)
from pyserve.api.wire.tools import MAX_TOOLS
from pyserve.engine.async_engine import AsyncEngine
from tests.api.fakes import PADDED_VOCAB, Server, run_server
from tests.api.instant import make_engine
from tests.machine import freeze, slowness
from tests.waiting import wait_until

MAX_STALL_S = 0.1
NUM_TRIES = 5
BEAT_S = 0.002
CONTEXT = 2**17
NUM_SLOTS = 256
MAX_SEQS = 640  # of one request: half of the slots and a queue of 1,024

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, INPUT_TOKENS = "/v1/responses", "/v1/responses/input_tokens"
MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"


@pytest.fixture(scope="module")
def large(tokenizer_folder: Path) -> Iterator[Server]:
    engine = make_engine(PADDED_VOCAB, max_model_len=CONTEXT, num_slots=NUM_SLOTS, kind=AsyncEngine)
    with run_server(tokenizer_folder, other=engine) as server:
        freeze()
        yield server


def chat(messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": messages, "max_tokens": 2, **fields}).encode()


def say(text: str, **fields: object) -> bytes:
    return chat([{"role": "user", "content": text}], **fields)


def complete(prompt: object, **fields: object) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": 2, **fields}).encode()


def respond(given: object) -> bytes:
    return json.dumps({"input": given, "max_output_tokens": 2}).encode()


def ids(num_prompts: int, length: int) -> list[list[int]]:
    return [[100 + i % 300] * (length - 1) + [i % 300] for i in range(num_prompts)]


def costly_fields() -> dict[str, Any]:
    """The longest lists that each sequence of a request can have."""
    length = MAX_STOP_CHARS_IN_ALL // MAX_STOP_STRINGS
    return {
        "temperature": 1,
        "logit_bias": {str(i): 0.5 for i in range(300)},
        "stop": [chr(0x100 + i) * length for i in range(MAX_STOP_STRINGS)],
        "stop_token_ids": list(range(200, 262)),
    }


def held(schema: object, **fields: object) -> bytes:
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return say("x", response_format=wrapped, **fields)


def tools(num_tools: int) -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    return [
        {"type": "function", "function": {"name": f"f{i}", "parameters": schema}}
        for i in range(num_tools)
    ]


def results(num_results: int, num_blocks: int) -> list[dict[str, Any]]:
    calls = [
        {"type": "tool_use", "id": f"c{i}", "name": "f", "input": {}} for i in range(num_results)
    ]
    told = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": [PART] * num_blocks}
        for call in calls
    ]
    user = {"role": "user", "content": "x"}
    return [user, {"role": "assistant", "content": calls}, {"role": "user", "content": told}]


ECHO = ("the quick brown fox 漢 " * MAX_ECHO_CHARS)[: MAX_ECHO_CHARS // MAX_N]
PART = {"type": "text", "text": "x"}
HIDDEN = {"type": "thinking", "thinking": "", "signature": hidden("quick brown fox " * 10_000)}
# (route, what is large) -> the body, and the status that it gets where that is not 200
REQUESTS: dict[tuple[str, str], Callable[[], bytes]] = {
    (CHAT, "text"): lambda: say("the quick brown fox " * 20_000),
    (CHAT, "text in escapes"): lambda: say("漢\n" * 20_000),
    (CHAT, "messages"): lambda: chat([{"role": "user", "content": "x"}] * MAX_MESSAGES),
    (CHAT, "parts"): lambda: chat([{"role": "user", "content": [PART] * MAX_PARTS}]),
    (CHAT, "spelled tokens"): lambda: say("<|im_end|>" * 12_000),
    (CHAT, "spelled tokens, truncated"): lambda: say(
        "<|im_end|>" * 100_000, truncate_prompt_tokens=10
    ),
    (CHAT, "kwargs"): lambda: say(
        "x", chat_template_kwargs={f"a{i}": [1] * 480 for i in range(MAX_TEMPLATE_KWARGS)}
    ),
    (CHAT, "metadata"): lambda: say("x", metadata={"a": ["x" * 50] * (MAX_JSON_VALUES - 20)}),
    (CHAT, "n"): lambda: say("x", n=MAX_N, **costly_fields()),
    (CHAT, "properties"): lambda: held(
        {
            "type": "object", "required": [f"p{i}" for i in range(1999)],
            "properties": {f"p{i}": {"type": "integer"} for i in range(1999)},
        },
        n=MAX_N,
    ),
    (CHAT, "an enum"): lambda: held({"enum": [f"h{i}" for i in range(19_000)]}, n=MAX_N),
    (CHAT, "tools"): lambda: say(
        "x", tools=tools(MAX_TOOLS // 4), tool_choice="required", n=MAX_N
    ),
    (COMPLETIONS, "a choice"): lambda: complete(
        "x", guided_choice=["h" * 9 + str(i) for i in range(9999)], n=MAX_N, temperature=1
    ),
    (COMPLETIONS, "a long grammar"): lambda: complete(
        "x", guided_grammar='start: "' + "h" * 60_000 + '"'
    ),
    (COMPLETIONS, "what may be left out"): lambda: complete(
        "x", guided_grammar="root ::= " + '"h"? ' * 400, n=10, temperature=1
    ),
    (COMPLETIONS, "text"): lambda: complete("the quick brown fox " * 20_000),
    (COMPLETIONS, "texts"): lambda: complete(["the quick brown fox " * 400] * MAX_SEQS),
    (COMPLETIONS, "prompts of ids"): lambda: complete(ids(MAX_BODY_IDS // 3000, 3000)),
    (COMPLETIONS, "fractions"): lambda: complete(
        [[float(i) for i in own] for own in ids(MAX_BODY_IDS // 3000, 3000)]
    ),
    (COMPLETIONS, "one prompt n times"): lambda: complete(
        ids(1, MAX_REQUEST_TOKENS // MAX_N), n=MAX_N, temperature=1
    ),
    (COMPLETIONS, "special tokens n times"): lambda: complete(
        [2] * (MAX_REQUEST_TOKENS // MAX_N), n=MAX_N, temperature=1
    ),
    (COMPLETIONS, "special tokens"): lambda: complete([2] * (CONTEXT - 2)),
    (COMPLETIONS, "sequences"): lambda: complete(ids(5, 9), n=MAX_N, **costly_fields()),
    (COMPLETIONS, "streams"): lambda: complete(
        ids(5, 9), n=MAX_N, stream=True, **costly_fields()
    ),
    (COMPLETIONS, "echo"): lambda: complete(
        ECHO, n=MAX_N, temperature=1, echo=True, max_tokens=0
    ),
    (COMPLETIONS, "streamed echo"): lambda: complete(
        ECHO, n=MAX_N, temperature=1, echo=True, max_tokens=0, stream=True
    ),  # fmt: skip
    (RESPONSES, "text"): lambda: respond("the quick brown fox " * 20_000),
    (RESPONSES, "items"): lambda: respond([{"role": "user", "content": "x"}] * MAX_MESSAGES),
    (INPUT_TOKENS, "text"): lambda: respond("the quick brown fox " * 20_000),
    (MESSAGES, "blocks"): lambda: chat([{"role": "user", "content": [PART] * MAX_PARTS}]),
    (MESSAGES, "blocks in results"): lambda: chat(results(40, 400)),
    (MESSAGES, "thinking that was not shown"): lambda: chat(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": [HIDDEN]}]
    ),
    (COUNT_TOKENS, "turns"): lambda: chat(
        [{"role": "user", "content": [{**PART, "cache_control": None}]}] * MAX_MESSAGES
    ),
    ("/tokenize", "text"): lambda: json.dumps(
        {"prompt": "x" * 2**20, "return_token_strs": True}
    ).encode(),
    ("/tokenize", "characters of many tokens"): lambda: json.dumps(
        {"prompt": "\U0001f9ff" * 2**18, "return_token_strs": True}
    ).encode(),
    ("/tokenize", "messages"): lambda: say(
        "<|im_end|>" * 12_000, return_token_strs=True, max_tokens=None
    ),
    ("/detokenize", "ids"): lambda: json.dumps(
        {"tokens": [i % 300 for i in range(2**20)]}
    ).encode(),
    ("/detokenize", "fractions"): lambda: json.dumps({"tokens": [80.0] * 2**20}).encode(),
}  # fmt: skip
# What a model that generates answers with a 400.
TEXTS = ["the quick brown fox " * 400] * 2048
POOLED = {
    "/v1/embeddings": {"input": TEXTS},
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), {"query": "x", "documents": TEXTS}),
    **dict.fromkeys(("/score", "/v1/score"), {"text_1": "x", "text_2": TEXTS}),
}
# What has no body: its largest request is its longest path.
LONG = "x" * (MAX_FIELD_BYTES - 100)
PATHS = {
    **{route.path: route.path.partition("{")[0] + LONG[len(route.path) :] for route in ROUTES},
    **{route.path: route.path for route in ROUTES if "{" not in route.path},
    "no such route": "/" + LONG,
    "many parts": "/v1" + "/x" * 4000,
}


def stall_of(server: Server, method: str, path: str, body: bytes) -> tuple[float, bytes]:
    """The longest time between two beats of the loop during one request, and its answer.

    No more than what the process has worked meanwhile: the rest is the machine's.
    """
    lags = []

    async def beat() -> None:
        while True:
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            await asyncio.sleep(BEAT_S)
            lag_s = time.monotonic() - began_s - BEAT_S
            lags.append(min(lag_s, time.process_time() - began_cpu_s))

    future = asyncio.run_coroutine_threadsafe(beat(), server.loop)
    try:
        wait_until(lambda: lags)  # on a busy machine the first beat may be late
        answer = ask(server.port, method, path, body)
        time.sleep(5 * BEAT_S)  # one that has ended late is noted
    finally:
        future.cancel()
    return max(lags), answer


def ask(port: int, method: str, path: str, body: bytes) -> bytes:
    """The first bytes of the answer, which is read to its end."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(head.encode())
        sock.sendall(body)
        first = b""
        while piece := sock.recv(2**20):
            first = first or piece
    return first


def check(server: Server, method: str, path: str, body: bytes, status: Sequence[int]) -> None:
    stalls = []
    for _ in range(NUM_TRIES):
        stall_s, answer = stall_of(server, method, path, body)
        assert int(answer.split(b" ")[1]) in status, answer[:500]
        stalls.append(stall_s)
        if stall_s < MAX_STALL_S:
            return
    limit_s = MAX_STALL_S * slowness()
    shown = [f"{1e3 * stall_s:.0f} ms" for stall_s in stalls]
    assert min(stalls) < limit_s, f"the loop stood still: {shown}, limit {1e3 * limit_s:.0f} ms"


@pytest.mark.parametrize("request_of", REQUESTS, ids=lambda pair: f"{pair[0]} {pair[1]}")
def test_the_largest_body(large: Server, request_of: tuple[str, str]) -> None:
    check(large, "POST", request_of[0], REQUESTS[request_of](), (200,))


@pytest.mark.parametrize("path", POOLED)
def test_the_largest_body_of_what_is_not_served(large: Server, path: str) -> None:
    check(large, "POST", path, json.dumps(POOLED[path]).encode(), (400,))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_has_no_body(large: Server, method: str, path: str) -> None:
    check(large, method, PATHS[path], b"", (200, 303, 400, 404, 405))


def test_every_route_is_measured() -> None:
    posts = {route.path for route in ROUTES if route.is_of_model}
    assert posts == {path for path, _ in REQUESTS} | POOLED.keys()
    assert {route.path for route in ROUTES} <= set(PATHS)


def work(duration_s: float) -> None:
    ends_s = time.thread_time() + duration_s
    while time.thread_time() < ends_s:
        pass


def test_the_clock_here_sees_a_stall(large: Server) -> None:
    timer = threading.Timer(0.05, large.loop.call_soon_threadsafe, [work, 0.15])
    timer.start()
    stall_s, _ = stall_of(large, "POST", "/tokenize", json.dumps({"prompt": "x " * 2**17}).encode())
    timer.join(30)
    assert stall_s > 0.14
