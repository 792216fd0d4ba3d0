"""SSE under trouble: errors after the 200, clients that leave, clients that do not read."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import pytest

from pyserve.errors import EngineError
from tests.api.fakes import Script, Server
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": "hi", "max_tokens": 400, "ignore_eos": True}


def test_an_error_after_the_200_is_one_frame_then_done(server: Server) -> None:
    server.engine.script = lambda number: Script([80, 81], error=EngineError("a step failed"))
    frames = server.frames(COMPLETIONS, {"prompt": "hi"})
    assert [frame["choices"][0]["text"] for frame in frames[:-1]] == ["n", "o"]
    assert frames[-1] == {
        "error": {
            "message": "a step failed", "type": "InternalServerError", "param": None, "code": 500,
        }
    }  # fmt: skip


def test_an_error_of_one_choice_ends_all(server: Server) -> None:
    server.engine.script = lambda number: (
        Script([80], 0.05, error=EngineError("broken")) if number else Script([80], 0.01)
    )
    frames = server.frames(CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 2})
    assert "error" in frames[-1]
    assert [item.is_aborted for item in server.engine.submitted] == [True, False]


def test_an_error_of_a_whole_answer_is_its_status(server: Server) -> None:
    server.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
    assert server.error(COMPLETIONS, {"prompt": "hi"}, 500)["message"] == "a step failed"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bug_of_ours_shows_nothing(
    server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(self: object, delta: object) -> str:
        raise ValueError("secret /root/path")

    monkeypatch.setattr("pyserve.api.generation.generate.Choice.advance", explode)
    server.play("Hello", eos=False, delay_s=0.01)
    if stream:
        error = server.frames(COMPLETIONS, LONG)[-1]["error"]
    else:
        error = server.error(COMPLETIONS, LONG, 500)
    assert (error["message"], error["type"]) == ("internal error", "InternalServerError")
    assert "secret" in caplog.text and "Traceback" in caplog.text
    wait_until(lambda: not server.engine.running())
    assert all(item.is_aborted for item in server.engine.submitted)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("starts", [False, True], ids=["queued", "running"])
def test_a_client_that_leaves_aborts_every_sequence(
    server: Server, path: str, n: int, stream: bool, starts: bool
) -> None:
    server.play("Hello", eos=False, delay_s=0.005, starts=starts)
    body = {**LONG, "n": n, "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    sock = server.connect(path, body)
    wait_until(lambda: len(server.engine.submitted) == n)
    if stream:
        assert b"200 OK" in sock.recv(65536)
    time.sleep(0.02)
    assert len(server.engine.running()) == n
    sock.close()
    wait_until(lambda: not server.engine.running())
    assert all(item.is_aborted for item in server.engine.submitted)
    wait_until(lambda: server.state.num_in_flight == 0)


def test_the_200_does_not_wait_for_the_first_token(server: Server) -> None:
    server.play("Hello", starts=False)
    sock = server.connect(COMPLETIONS, {**LONG, "stream": True})
    assert b"200 OK" in sock.recv(65536)
    sock.close()
    wait_until(lambda: not server.engine.running())


def test_a_slow_reader_bounds_its_buffer_and_slows_nobody(server: Server) -> None:
    """It reads nothing while its 128 sequences run to their end; then nothing is missing."""
    n, num_tokens = 128, 500
    token_ids = server.play("fox ", eos=False)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(20)
    slow.connect(("127.0.0.1", server.port))
    body = {"prompt": [80], "max_tokens": num_tokens, "n": n, "stream": True, "ignore_eos": True}
    slow.sendall(request_bytes(body))
    wait_until(lambda: len(server.engine.submitted) == n)
    answer = server.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 20})
    assert answer["usage"]["completion_tokens"] == 20
    wait_until(lambda: not server.engine.running())
    reply = http.client.HTTPResponse(slow)
    reply.begin()
    frames = reply.read().decode().split("\n\n")
    slow.close()
    assert frames[-2:] == ["data: [DONE]", ""]
    texts = [""] * n
    for frame in frames[:-2]:
        (choice,) = json.loads(frame.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    repeated = (token_ids * num_tokens)[:num_tokens]
    assert set(texts) == {server.tokenizer.decode(repeated, skip_special_tokens=True)}
    # One frame a token would be this many; what the socket did not take has coalesced.
    assert len(frames) < n * num_tokens * 0.8


def test_nothing_on_the_way_may_hold_a_stream_back(server: Server) -> None:
    body = {"prompt": "hi", "stream": True}
    headers = {"Accept-Encoding": "gzip, br, zstd", "Accept": "*/*"}
    status, answered, _ = server.request("POST", COMPLETIONS, body, headers)
    assert status == 200 and "Content-Encoding" not in answered
    assert answered["Cache-Control"] == "no-cache, no-transform"
    assert answered["X-Accel-Buffering"] == "no"


def test_many_tokens_at_once_are_one_write_and_one_frame(server: Server) -> None:
    server.play("Hello world", burst=100)
    assert len(server.frames(COMPLETIONS, {"prompt": "hi"})) == 1


@pytest.mark.parametrize("connection", [None, "keep-alive", "Keep-Alive", "close"])
def test_a_stream_to_http_1_0_ends_with_the_connection(
    server: Server, connection: str | None
) -> None:
    """Without chunked coding nothing else ends it, whatever the client would like to keep."""
    server.play("Hello")
    data = request_bytes({"prompt": "hi", "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    if connection is not None:
        data = data.replace(b"Host: x", f"Host: x\r\nConnection: {connection}".encode(), 1)
    head, _, body = exchange(server, data).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and b"keep-alive" not in head.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def exchange(server: Server, data: bytes) -> bytes:
    """All that comes until the server hangs up; a server that does not is a timeout."""
    reply = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(data)
        while piece := sock.recv(65536):
            reply += piece
    return reply


# Every character at which str.splitlines ends a line, and a few that readers in C stumble over.
BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
ODD_TEXT = "a" + "b".join(BREAKS) + 'c\x00\x7f\ufeff\u200b\u2027\u202a\x84\x86😀漢é\\"data: x'


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_character_of_a_text_ends_its_line(server: Server, path: str) -> None:
    """As readers see it that are built on str.splitlines, such as httpx's and requests'."""
    server.play(ODD_TEXT + "end", delay_s=0.001)
    body = {
        "prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "stream": True,
        "stop": ["end"], "request_id": "x" + BREAKS, "max_tokens": 300,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    status, _, reply = server.request("POST", path, body)
    assert status == 200
    frames = read_lines(reply)
    assert {frame["id"].partition("-")[2] for frame in frames} == {"x" + BREAKS}
    choices = [choice for frame in frames for choice in frame["choices"]]
    text = "".join(choice.get("text") or choice.get("delta", {}).get("content", "")
                   for choice in choices)  # fmt: skip
    assert text == ODD_TEXT and choices[-1]["stop_reason"] == "end"


def test_no_character_of_an_error_or_a_stop_reason_ends_its_line(server: Server) -> None:
    server.engine.script = lambda number: Script([80], error=EngineError("failed" + BREAKS))
    _, _, reply = server.request("POST", COMPLETIONS, {"prompt": "hi", "stream": True})
    assert read_lines(reply)[-1]["error"]["message"] == "failed" + BREAKS
    server.play("x" + BREAKS + "y")
    body = {"prompt": "hi", "stream": True, "stop": [BREAKS]}
    _, _, reply = server.request("POST", COMPLETIONS, body)
    assert read_lines(reply)[-1]["choices"][0]["stop_reason"] == BREAKS


def read_lines(reply: bytes) -> list[Any]:
    """The frames of a stream, taken apart by a reader that goes by str.splitlines."""
    lines = reply.decode().splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2) and lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2:2]]


def test_every_chunk_is_whole_frames(server: Server) -> None:
    """For readers that decode, or parse, each piece as it comes."""
    server.play("漢字 😀 é " * 5, delay_s=0.001)
    data = request_bytes({"prompt": "hi", "stream": True, "max_tokens": 200})
    rest = exchange(server, data.replace(b"Host: x", b"Host: x\r\nConnection: close", 1))
    rest = rest.partition(b"\r\n\r\n")[2]
    num_chunks = 0
    while not rest.startswith(b"0\r\n"):
        size, _, rest = rest.partition(b"\r\n")
        chunk, rest = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.decode()
        num_chunks += 1
    assert num_chunks > 5 and rest == b"0\r\n\r\n"


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
