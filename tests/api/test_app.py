"""Routes: the error shape everywhere, keys, phases, limits of the body, broken HTTP."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve import __version__
from tests.api.fakes import Server, run_server
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
MAX_BODY_BYTES = 100_000


@pytest.fixture(scope="module")
def guarded(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(
        tokenizer_folder, api_keys=("secret", "klüsel"), max_body_bytes=MAX_BODY_BYTES
    ) as server:
        yield server


@pytest.fixture
def fresh(tokenizer_folder: Path) -> Iterator[Server]:
    """For tests that move the server to another phase."""
    with run_server(tokenizer_folder) as server:
        yield server


def check_error(reply: tuple[int, dict[str, str], bytes], status: int, kind: str) -> None:
    got, headers, body = reply
    assert got == status and headers["Content-Type"].startswith("application/json")
    assert headers["Server"] == "pyserve"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)


def test_unknown_paths_and_verbs(server: Server) -> None:
    for path in ("/nothing", "/v1", "/v1/nothing", "//", "/%ff", "/v1/../etc"):
        for method in ("GET", "POST", "DELETE"):
            check_error(server.request(method, path), 404, "NotFoundError")
    for method, path in (("GET", CHAT), ("PUT", "/health"), ("POST", "/v1/models")):
        reply = server.request(method, path)
        check_error(reply, 405, "MethodNotAllowedError")
        assert reply[1]["Allow"]
    check_error(server.request("TRACE", "/health"), 405, "MethodNotAllowedError")


def test_small_routes(server: Server) -> None:
    assert json.loads(server.request("GET", "/version")[2]) == {"version": __version__}
    for method, path in (
        ("GET", "/health"), ("GET", "/health/ready"), ("GET", "/ping"), ("POST", "/ping")
    ):  # fmt: skip
        status, _, body = server.request(method, path)
        assert status == 200 and json.loads(body)["status"] == "ready"
    assert server.request("HEAD", "/health")[0] == 200
    status, headers, body = server.request("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    assert b"vllm:num_requests_running" in body


def test_metrics_count_requests(server: Server) -> None:
    def finished(reason: str) -> int:
        text = server.request("GET", "/metrics")[2].decode()
        line = next(
            line for line in text.splitlines()
            if line.startswith("vllm:request_success_total") and f'"{reason}"' in line
        )  # fmt: skip
        return int(float(line.split()[-1]))

    before = finished("stop"), finished("length")
    server.post(CHAT, {"messages": MESSAGES})
    server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1, "n": 2})
    assert (finished("stop"), finished("length")) == (before[0] + 1, before[1] + 2)


def test_a_key_that_is_not_ascii(guarded: Server) -> None:
    key = "Bearer klüsel".encode().decode("latin-1")  # as http.client sends bytes
    assert guarded.request("GET", "/version", headers={"Authorization": key})[0] == 200


def test_what_does_not_exist_needs_the_key_too(guarded: Server) -> None:
    check_error(guarded.request("GET", "/nothing"), 401, "AuthenticationError")
    check_error(guarded.request("GET", CHAT), 401, "AuthenticationError")
    check_error(guarded.request("GET", "/health/../version"), 401, "AuthenticationError")
    check_error(guarded.request("POST", "/health"), 401, "AuthenticationError")


def test_while_starting(fresh: Server) -> None:
    fresh.state.status = "starting"
    fresh.state.startup.report("load", 0, 0)
    status, _, body = fresh.request("GET", "/health")
    answer = json.loads(body)
    assert status == 503 and answer.pop("eta_s") is None
    assert list(answer.pop("ended")) == ["start"]
    assert answer == {"status": "starting", "phase": "load", "progress": None}
    fresh.state.startup.report("load", 25, 100)
    answer = json.loads(fresh.request("GET", "/ping")[2])
    assert answer["progress"] == 0.25 and answer["eta_s"] >= 0
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("POST", "/tokenize")):
        reply = fresh.request(method, path, {"messages": MESSAGES})
        check_error(reply, 503, "ServiceUnavailableError")
        assert int(reply[1]["Retry-After"]) >= 1
        assert "load, 25%" in json.loads(reply[2])["error"]["message"]
    assert fresh.request("GET", "/version")[0] == fresh.request("GET", "/metrics")[0] == 200


def test_while_draining(fresh: Server) -> None:
    fresh.play("Hello", eos=False, delay_s=0.002)
    sock = fresh.connect(CHAT, {"messages": MESSAGES, "max_tokens": 20, "stream": True})
    wait_until(lambda: fresh.state.num_in_flight == 1)
    fresh.state.status = "draining"
    health = json.loads(fresh.request("GET", "/health")[2])
    assert health["status"] == "draining" and "1 request still to finish" in health["reason"]
    reply = fresh.request("POST", CHAT, {"messages": MESSAGES})
    check_error(reply, 503, "ServiceUnavailableError")
    assert reply[1]["Connection"] == "close" and "Retry-After" in reply[1]
    received = b""
    while b"[DONE]" not in received:
        received += sock.recv(65536)
    assert b'"finish_reason":"length"' in received
    sock.close()


def test_a_dead_engine_is_not_healthy(server: Server) -> None:
    server.engine.error = "the engine has stopped"
    status, _, body = server.request("GET", "/health")
    assert status == 503
    assert json.loads(body) == {"status": "failed", "reason": "the engine has stopped"}
    assert server.request("GET", "/health/live")[0] == 200


def test_an_engine_that_refuses_is_503(fresh: Server) -> None:
    fresh.engine.is_stopped = True
    for stream in (False, True):
        reply = fresh.request("POST", CHAT, {"messages": MESSAGES, "stream": stream})
        check_error(reply, 503, "ServiceUnavailableError")
        assert reply[1]["Retry-After"] == "1"
    fresh.engine.is_stopped = False


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=x", 400),
        ("", 400),
    ],
)
def test_content_types(server: Server, content_type: str, status: int) -> None:
    reply = server.request(
        "POST", CHAT, {"messages": MESSAGES}, headers={"Content-Type": content_type}
    )
    assert reply[0] == status
    if status == 400:
        assert "application/json" in json.loads(reply[2])["error"]["message"]


def test_no_content_type_is_json(server: Server) -> None:
    with server.connect(CHAT, {"messages": MESSAGES}) as sock:
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def post_with_key(server: Server, data: Any, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request("POST", CHAT, data, {"Authorization": "Bearer secret", **headers})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_a_body_over_the_limit(guarded: Server) -> None:
    at_limit = b'{"messages": 1' + b" " * (MAX_BODY_BYTES - 15) + b"}"
    assert len(at_limit) == MAX_BODY_BYTES
    assert post_with_key(guarded, at_limit, {})[0] == 400
    pieces = (b" " * 10_000 for _ in range(20))
    for data in (at_limit + b" ", b" " * 5_000_000, pieces):  # the last one has no length
        status, body = post_with_key(guarded, data, {})
        assert status == 413
        error = json.loads(body)["error"]
        assert str(MAX_BODY_BYTES) in error["message"]
        assert error["type"] == "RequestEntityTooLargeError"


def test_an_announced_body_is_refused_unread(guarded: Server) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as sock:
        sock.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            "Content-Length: 50000000\r\n\r\n".encode()
        )
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_compressed_bodies_are_refused(guarded: Server) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    assert post_with_key(guarded, body, {"Content-Encoding": "identity"})[0] == 200
    for data in (gzip.compress(body), gzip.compress(b" " * 50_000_000), b"not gzip at all"):
        status, reply = post_with_key(guarded, data, {"Content-Encoding": "gzip"})
        assert status == 400 and "compressed" in json.loads(reply)["error"]["message"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: b\r\n" * 1000 + b"\r\n",
    ],
    ids=["tls", "version", "length", "chunk", "long path", "long header", "many headers"],
)
def test_broken_http_is_a_short_400(
    server: Server, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(request_bytes)
        received = b""
        while piece := sock.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.") and b" 400 " in head.split(b"\r\n")[0]
    assert json.loads(body)["error"]["type"] == "BadRequestError"
    assert len(body) < 300
    assert "Traceback" not in caplog.text
    assert server.request("GET", "/health")[0] == 200


def test_a_half_sent_body_is_let_go(server: Server) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf".encode())
    wait_until(lambda: server.state.num_in_flight == 1)
    sock.close()
    wait_until(lambda: server.state.num_in_flight == 0)
    assert server.engine.submitted == []


def test_connections_are_kept(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    data = json.dumps({"messages": MESSAGES, "stream": True})
    for status, body in ((200, data), (400, "{}"), (200, data)):
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == status and reply.read()
        assert connection.sock is not None
    connection.close()


def test_a_panic_of_the_tokenizer_is_a_500(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As the one that pyo3 raises where Rust panics."""

    class Backend:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> None:
            raise PanicException("boom")

    monkeypatch.setattr(server.tokenizer, "_backend", Backend())
    for prompt in ("x", "x" * 10_000):  # on the event loop, and on a thread
        error = server.error("/v1/completions", {"prompt": prompt}, 500)
        assert error["message"] == "internal error"
    assert server.request("GET", "/health")[0] == 200
