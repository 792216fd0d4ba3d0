"""Places, clients that have gone unheard, answers that nobody reads."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.http import bounds
from tests.api.fakes import Script, Server, run_server
from tests.api.tls_files import CERTIFICATE, KEY
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "hi", "max_tokens": 500, "ignore_eos": True}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
# A gone client is found out within a second; a busy machine has ten times as long for it.
GONE_S = 1.0
SLACK_S = 9.0


def post(body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/{version}", "Host: x", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    sock.sendall(sent)
    return sock


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    try:
        while piece := sock.recv(65536):
            received += piece
    except ConnectionError:
        pass
    sock.close()
    return received


def body_of(reply: bytes) -> Any:
    """Of an answer, whatever interim ones came before it."""
    while reply.startswith(b"HTTP/1.1 100 "):
        reply = reply.partition(b"\r\n\r\n")[2]
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.") and b" 200 " in head.splitlines()[0]
    return json.loads(body)


@pytest.fixture
def tls_server(tmp_path: Path, tokenizer_folder: Path) -> Iterator[Server]:
    (tmp_path / "pem").write_text(KEY + CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    with run_server(tokenizer_folder, tls=context) as server:
        yield server


def wrap(sock: socket.socket) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)


@contextmanager
def neighbours(server: Server) -> Iterator[None]:
    """Three streams beside it: each exact, and never without a token for 5 s."""
    problems: list[str] = []
    expected = server.frames(COMPLETIONS, {"prompt": "hi", "max_tokens": 300})
    is_over = threading.Event()

    def stream() -> None:
        with server.sdk() as client:
            while not is_over.is_set():
                text, last_s, gap_s = "", time.monotonic(), 0.0
                for chunk in client.completions.create(
                    model="alias", prompt="hi", max_tokens=300, stream=True
                ):
                    gap_s = max(gap_s, time.monotonic() - last_s)
                    last_s = time.monotonic()
                    text += chunk.choices[0].text
                if text != "".join(frame["choices"][0]["text"] for frame in expected):
                    problems.append(f"not exact: {text!r}")
                if gap_s > 5.0:
                    problems.append(f"stood still for {gap_s:.2f} s")

    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)
    assert problems == []


# -- places ----------------------------------------------------------------------------------------


def test_the_idlest_connection_makes_place_for_a_new_one(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_CONNECTIONS", 4)
    with run_server(tokenizer_folder) as server:
        server.engine.script = lambda number: Script([80], 0.02)
        stream = connect(server, post({**LONG, "stream": True}))
        assert stream.recv(65536)
        idle = []
        for _ in range(3):
            idle.append(connect(server))
            wait_until(lambda: len(server.connections) == 1 + len(idle))
        idle[0].sendall(HEALTH)  # from here on idle[1] has asked nothing for longest
        assert idle[0].recv(65536).startswith(b"HTTP/1.1 200 ")
        new = connect(server, HEALTH)
        assert new.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert read_to_end(idle[1]) == b""
        for sock in (idle[0], idle[2], new):
            sock.sendall(HEALTH)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            sock.close()
        assert stream.recv(65536)
        stream.close()


def test_a_slow_body_makes_place_too(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(bounds, "EXPENDABLE_S", 0.3)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
    with run_server(tokenizer_folder) as server:
        slow = [connect(server, head + b"{") for _ in range(2)]
        wait_until(lambda: server.state.num_in_flight == 2)
        assert read_to_end(connect(server, HEALTH)) == b"", "both may still be on their way"
        time.sleep(0.3)
        new = connect(server, HEALTH)
        assert new.recv(65536).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: server.state.num_in_flight == 1)
        for sock in (*slow, new):
            sock.close()


def test_connections_without_a_handshake_are_counted(
    tls_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_HANDSHAKES", 5)
    silent = [connect(tls_server) for _ in range(12)]
    wait_until(lambda: len(tls_server.connections) == 5)
    for sock in silent[:7]:
        assert read_to_end(sock) == b"", "the oldest make place"
    with wrap(connect(tls_server)) as client:
        client.sendall(HEALTH)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert len(tls_server.connections) == 5 + 0
    for sock in silent:
        sock.close()
    wait_until(lambda: len(tls_server.connections) == 0)


@pytest.mark.parametrize("is_tls", [False, True])
def test_a_storm_of_silent_connections_hurts_nobody(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, is_tls: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(bounds, "MAX_TLS_CONNECTIONS" if is_tls else "MAX_CONNECTIONS", 60)
    (tmp_path / "pem").write_text(KEY + CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    most = 0
    with run_server(tokenizer_folder, tls=context if is_tls else None) as server:
        server.play("The quick brown fox", delay_s=0.01)
        storm = []
        for _ in range(500):
            storm.append(connect(server))
            most = max(most, len(server.connections))
        sock = wrap(connect(server)) if is_tls else connect(server)
        sock.sendall(post({"prompt": "hi", "max_tokens": 4}, "Connection: close"))
        assert body_of(read_to_end(sock))["choices"]
        assert most <= 60
        for sock in storm:
            sock.close()
    assert len(caplog.records) <= 2 and "Traceback" not in caplog.text


# -- who has ended a side, and who has gone --------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_who_ends_its_side_gets_its_answer(server: Server, streamed: bool) -> None:
    server.play("Hello world", delay_s=0.3)
    sock = connect(server, post({"prompt": "hi", "stream": streamed}))
    sock.shutdown(socket.SHUT_WR)
    reply = read_to_end(sock)
    if streamed:
        assert reply.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        assert body_of(reply)["choices"][0]["text"] == "Hello world"
    assert not any(item.is_aborted for item in server.engine.submitted)


def test_who_ends_its_side_gets_all_its_answers(server: Server) -> None:
    server.play("Hello world", delay_s=0.05)
    sock = connect(server, HEALTH + post({"prompt": "hi"}) + HEALTH * 3 + post({"prompt": "hi"}))
    sock.shutdown(socket.SHUT_WR)
    reply = read_to_end(sock)
    assert reply.count(b"HTTP/1.1 200 ") == 6 and reply.count(b'"Hello world"') == 2


def test_a_quick_answer_is_not_preceded_by_anything(server: Server) -> None:
    for version in (b"HTTP/1.1", b"HTTP/1.0"):
        sock = connect(server, HEALTH.replace(b"HTTP/1.1", version))
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock).startswith(version + b" 200 OK")


def test_half_a_body_and_no_more_is_refused_or_closed_at_once(server: Server) -> None:
    started_s = time.monotonic()
    for sent in (post({"prompt": "hi"})[:-5], HEALTH * 2 + post({"prompt": "hi"})[:-5]):
        sock = connect(server, sent)
        sock.shutdown(socket.SHUT_WR)
        reply = read_to_end(sock)
        assert reply.count(b"HTTP/1.1 200 ") == sent.count(b"GET ")
    assert time.monotonic() - started_s < GONE_S + SLACK_S
    wait_until(lambda: server.state.num_in_flight == 0)


BEHIND = {
    "nothing": b"",
    "a request": HEALTH,
    "many requests": HEALTH * 100,
    "a body": post({"prompt": "x" * 300_000}),
    "a body that fills all buffers": post({"prompt": "x" * 12_000_000}),
    "half a request": HEALTH[:10],
}
RUNNING = {
    "whole": ({}, Script([80], 0.02)),
    "stream": ({"stream": True}, Script([80], 0.02)),
    "silent stream": ({"stream": True}, Script([80], 3.0)),
    "queued": ({}, Script([80], starts=False)),
    "queued stream": ({"stream": True}, Script([80], starts=False)),
}


def leave(sock: socket.socket, ending: str) -> None:
    if ending == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_what_it_takes(sock: socket.socket, data: bytes) -> None:
    """Until nobody takes more: the other side may have stopped reading."""
    sock.settimeout(0.2)
    try:
        sock.sendall(data)
    except TimeoutError:
        pass


@pytest.mark.parametrize("running", RUNNING)
def test_the_sequences_of_clients_that_have_gone_end(server: Server, running: str) -> None:
    """All at once, as each is found out by itself: whatever is behind, however it leaves."""
    fields, script = RUNNING[running]
    submitted = server.engine.submitted
    submitted.clear()
    server.engine.script = lambda number: script
    kinds = list(product(BEHIND, ("close", "reset")))

    def has_come(number: int) -> bool:
        return len(submitted) == number

    sockets = []
    for number, (behind, _) in enumerate(kinds, 1):
        sockets.append(connect(server, post({**LONG, **fields})))
        wait_until(partial(has_come, number))
        send_what_it_takes(sockets[-1], BEHIND[behind])
    time.sleep(0.1)
    assert len(server.engine.running()) == len(kinds)
    for sock, (_, ending) in zip(sockets, kinds, strict=True):
        leave(sock, ending)
    with suppress(AssertionError):  # which of them are left is said below
        wait_until(lambda: server.engine.running() == [], GONE_S + SLACK_S)
    pairs = zip(kinds, submitted, strict=True)
    assert [kind for kind, item in pairs if not item.is_aborted] == []


@pytest.mark.parametrize("behind", ["nothing", "many requests", "a body that fills all buffers"])
def test_the_same_with_tls(tls_server: Server, behind: str) -> None:
    tls_server.engine.script = lambda number: Script([80], starts=False)
    sock = wrap(connect(tls_server))
    sock.sendall(post(LONG))
    wait_until(lambda: len(tls_server.engine.submitted) == 1)
    send_what_it_takes(sock, BEHIND[behind])
    sock.close()
    wait_until(lambda: tls_server.engine.running() == [], GONE_S + SLACK_S)


def test_who_knows_of_nothing_before_an_answer_is_let_go(server: Server) -> None:
    """HTTP/1.0 has no interim answers, so that a client that has gone could not be found out."""
    server.engine.script = lambda number: Script([80], starts=False)
    sock = connect(server, post(LONG, version="1.0"))
    wait_until(lambda: server.engine.running() != [])
    sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: server.engine.running() == [], GONE_S + SLACK_S)
    sock.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_sends_a_large_body_is_not_probed(server: Server, version: str) -> None:
    """Reading stops and goes on while it comes."""
    sent = post({"prompt": "hi", "max_tokens": 1, "user": "x" * 8_000_000}, version=version)
    sock = connect(server)
    for start in range(0, len(sent), 500_000):
        sock.sendall(sent[start : start + 500_000])
        time.sleep(0.05)
    assert sock.recv(65536).startswith(f"HTTP/{version} 200 ".encode())
    sock.close()


def test_many_gone_clients_beside_three_streams(server: Server) -> None:
    server.play("The quick brown fox jumps over the lazy dog.", delay_s=0.01)
    with neighbours(server):
        behind = HEALTH * 100
        for _ in range(5):
            gone = [connect(server, post({**LONG, "n": 4}) + behind) for _ in range(20)]
            time.sleep(0.1)
            for sock in gone:
                sock.close()
            time.sleep(0.1)
    wait_until(lambda: server.engine.running() == [], GONE_S + SLACK_S)


# -- answers that nobody reads ---------------------------------------------------------------------


def echo(num_bytes: int, **fields: Any) -> dict[str, Any]:
    """A request whose answer is of a little more than `num_bytes`."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 40
    n = num_bytes // len(prompt)
    return {"prompt": prompt, "n": n, "echo": True, "max_tokens": 0, **fields}


def narrow(server: Server, sent: bytes) -> socket.socket:
    """A connection whose buffers hold next to nothing, on a listener that has been narrowed."""
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    sock.settimeout(10)
    sock.sendall(sent)
    return sock


@pytest.mark.parametrize("streamed", [False, True])
def test_who_takes_nothing_is_cut_off(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr(bounds, "WRITE_TIMEOUT_S", 0.5)
    with run_server(tokenizer_folder) as server:
        sock = narrow(server, post(echo(200_000, stream=streamed)))
        assert sock.recv(10) == b"HTTP/1.1 2"
        wait_until(lambda: server.connections.num_unread_bytes > 100_000)
        wait_until(lambda: server.connections.num_unread_bytes == 0)
        assert len(server.connections) == 0 and server.state.num_in_flight == 0
        assert b"[DONE]" not in read_to_end(sock)


def take_little_by_little(server: Server) -> bytes:
    """An answer of 220 KB, 70 KB a second on their way at most; what has come where it is cut."""
    started_s = time.monotonic()
    sock = narrow(server, post(echo(200_000), "Connection: close"))
    received = b""
    with sock, suppress(ConnectionError):
        while piece := sock.recv(100_000):
            received += piece
            time.sleep(max(started_s + len(received) / 70_000 - time.monotonic(), 0.0))
    return received


def test_who_takes_a_little_all_the_time_gets_it_all(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece has its time, not the answer. A machine that stands still takes that time as well, so
    one of some tries counts."""
    monkeypatch.setattr(bounds, "WRITE_TIMEOUT_S", 1.5)
    with run_server(tokenizer_folder) as server:
        for _ in range(5):
            started_s = time.monotonic()
            received = take_little_by_little(server)
            if len(received) > 200_000:
                break
        assert time.monotonic() - started_s > bounds.WRITE_TIMEOUT_S
        assert len(body_of(received)["choices"]) == 111


def test_what_nobody_reads_has_a_bound_and_costs_who_holds_it(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten answers of 220 KB where half a million bytes may wait: the oldest go."""
    monkeypatch.setattr(bounds, "MAX_UNREAD_BYTES", 500_000)
    with run_server(tokenizer_folder) as server:
        held = []
        for number in range(10):
            held.append(narrow(server, post(echo(200_000))))
            assert held[-1].recv(10) == b"HTTP/1.1 2", number
            wait_until(lambda: server.connections.num_unread_bytes > 100_000)
            assert server.connections.num_unread_bytes <= 500_000
        assert len(server.connections) <= 3
        new = connect(server, post(echo(200_000), "Connection: close"))
        assert len(body_of(read_to_end(new))["choices"]) == 111
        for sock in held:
            sock.close()
        wait_until(lambda: server.connections.num_unread_bytes == 0)


def test_an_echo_that_can_never_be_held_is_not_made(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_UNREAD_BYTES", 50_000)
    with run_server(tokenizer_folder) as server:
        for streamed in (False, True):
            status, headers, reply = server.request(
                "POST", COMPLETIONS, echo(200_000, stream=streamed)
            )
            assert status == 429 and headers["Retry-After"] == str(bounds.UNREAD_RETRY_S)
            assert json.loads(reply)["error"]["type"] == "RateLimitError"
        assert server.post(COMPLETIONS, echo(20_000))["choices"]


def test_the_end_of_an_answer_is_waited_for_no_longer(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than a piece is left, aiohttp has done with it, and still nobody takes it."""
    monkeypatch.setattr(bounds, "WRITE_TIMEOUT_S", 0.5)
    with run_server(tokenizer_folder) as server:
        sock = narrow(server, post(echo(50_000), "Connection: close"))
        assert sock.recv(10) == b"HTTP/1.1 2"
        wait_until(lambda: len(server.connections) == 0)
        read_to_end(sock)
