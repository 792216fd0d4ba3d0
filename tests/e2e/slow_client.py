"""A client that takes one byte a second of its stream, beside others that read theirs."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from typing import NamedTuple

NUM_OTHERS = 255
NUM_TOKENS = 40  # of each of the others
LONG = 1500  # tokens of the slow one's stream: more bytes than its socket holds
MAX_GAP_S = 10.0  # in the others' streams, on a machine that does other things beside


class Stream(NamedTuple):
    num_tokens: int
    finish_reason: str
    longest_gap_s: float


def request_bytes(max_tokens: int, number: int) -> bytes:
    body = json.dumps({
        "model": "pyserve-demo", "prompt": f"Hello {number}", "max_tokens": max_tokens,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_stream(port: int, number: int) -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(NUM_TOKENS, number))
    reason, num_tokens, gap_s, last_s = "", 0, 0.0, 0.0
    async for line in reader:
        if not line.startswith(b"data: {"):
            assert not line.startswith(b"HTTP/") or b" 200 " in line, line
            continue
        now_s = time.monotonic()
        gap_s, last_s = max(gap_s, now_s - (last_s or now_s)), now_s
        frame = json.loads(line.removeprefix(b"data: "))
        assert "error" not in frame, frame
        for choice in frame["choices"]:
            reason = choice["finish_reason"] or reason
        if frame.get("usage"):
            num_tokens = frame["usage"]["completion_tokens"]
    writer.close()
    return Stream(num_tokens, reason, gap_s)


async def check_beside_a_slow_client(port: int) -> None:
    """The others' streams are whole and never stand still, while the slow one has next to nothing;
    then it leaves."""
    loop = asyncio.get_running_loop()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    await loop.sock_connect(slow, ("127.0.0.1", port))
    await loop.sock_sendall(slow, request_bytes(LONG, 0))
    taken = b""

    async def sip() -> None:
        nonlocal taken
        while True:
            taken += await loop.sock_recv(slow, 1)
            await asyncio.sleep(1.0)

    sipping = asyncio.create_task(sip())
    began_s = time.monotonic()
    streams = await asyncio.gather(*(read_stream(port, i) for i in range(1, NUM_OTHERS + 1)))
    duration_s = time.monotonic() - began_s
    sipping.cancel()
    with suppress(asyncio.CancelledError):
        await sipping
    slow.close()
    assert 0 < len(taken) <= duration_s + 2 and b"HTTP/1.1 200 OK".startswith(taken[:15])
    assert {stream[:2] for stream in streams} == {(NUM_TOKENS, "length")}
    assert max(stream.longest_gap_s for stream in streams) < MAX_GAP_S
