"""SSE under trouble: errors after the 200, clients that leave, clients that do not read."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import pytest

from pyserve.errors import EngineError
from tests.api.fakes import Script, Server, wait_until

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

    monkeypatch.setattr("pyserve.api.generate.Choice.advance", explode)
    if stream:
        error = server.frames(COMPLETIONS, {"prompt": "hi"})[-1]["error"]
    else:
        error = server.error(COMPLETIONS, {"prompt": "hi"}, 500)
    assert (error["message"], error["type"]) == ("internal error", "InternalServerError")
    assert "secret" in caplog.text and "Traceback" in caplog.text
    wait_until(lambda: not server.engine.running())


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
    wait_until(lambda: not server.engine.running(), 1.0)
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
    wait_until(lambda: not server.engine.running(), 20)
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


def test_many_tokens_at_once_are_one_write_and_one_frame(server: Server) -> None:
    server.play("Hello world", burst=100)
    assert len(server.frames(COMPLETIONS, {"prompt": "hi"})) == 1


def test_a_stream_to_http_1_0_ends_with_the_connection(server: Server) -> None:
    server.play("Hello")
    data = request_bytes({"prompt": "hi", "stream": True})
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(data.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        reply = b""
        while piece := sock.recv(65536):
            reply += piece
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
