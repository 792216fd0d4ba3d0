"""What a refused request held is free once it is answered, without the cycle collector."""

from __future__ import annotations

import gc
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import StreamReader

from pyserve.errors import EngineError, RequestError
from tests.api.fakes import Script, Server
from tests.machine import freeze
from tests.waiting import wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "word " * 2**20  # tokenised on a thread


@pytest.fixture
def without_collector() -> Iterator[None]:
    freeze()
    gc.disable()
    yield
    gc.enable()


def num_held() -> int:
    """Errors of requests that still hold the frames that they were raised in."""
    return sum(
        issubclass(type(o), RequestError) and o.__traceback__ is not None
        for o in gc.get_objects()  # of some, __class__ is a property that warns
    )


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": LONG}),
        (COMPLETIONS, {"prompt": LONG, "max_tokens": 1}),
        (COMPLETIONS, {"prompt": [1] * 50_000, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
        (CHAT, b'{"messages": [' + b" " * 2**20 + b"}"),
        (COMPLETIONS, {"prompt": "hi", "n": 0}),
    ],
    ids=["tokenize", "completions", "ids", "chat", "json", "short"],
)
def test_a_refusal_holds_nothing(server: Server, path: str, body: Any) -> None:
    server.error(path, body)
    wait_until(lambda: num_held() == 0)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_holds_nothing(server: Server, stream: bool) -> None:
    server.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
    body = {"prompt": "hi", "stream": stream}
    status, _, reply = server.request("POST", COMPLETIONS, body)
    assert status == (200 if stream else 500) and b"a step failed" in reply
    wait_until(lambda: num_held() == 0)


def num_unread() -> int:
    """Bytes of bodies that have come and that nobody has read."""
    readers = [o for o in gc.get_objects() if type(o) is StreamReader]
    return sum(sum(map(len, reader._buffer)) for reader in readers)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("is_reset", [False, True])
def test_who_leaves_more_behind_a_request_leaves_nothing(server: Server, is_reset: bool) -> None:
    server.engine.script = lambda number: Script([80] * 1000, delay_s=0.01)
    asked = json.dumps({"prompt": "hi", "max_tokens": 1000}).encode()
    behind = b" " * 300_000
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            for body in (asked, behind):
                head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                sock.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_until(lambda: num_unread() > 0)
            if is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: num_unread() == 0)
