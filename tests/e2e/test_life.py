"""Streams side by side, clients that leave, start-up and shutdown of the real process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from bench.hostile_clients import Target, run_attack
from bench.neighbour import Seen
from bench.server_process import free_port
from pyserve.http_client import Endpoint
from tests.e2e.conftest import ROOT, Server, start_server
from tests.e2e.slow_client import check_beside_a_slow_client
from tests.waiting import wait_until

LONG: dict[str, Any] = {
    "model": "pyserve-demo", "prompt": "Hello", "max_tokens": 1500, "ignore_eos": True,
}  # fmt: skip
# Question -> what a right answer holds, whatever rounding does to its wording.
ANSWERS = {
    "What is the capital of France?": "Paris", "¿Cuál es la capital de España?": "Madrid",
    "What is the capital of Japan?": "Tokyo", "What is 12 + 30?": "42",
    "Repeat: the quick brown fox": "the quick brown fox", "Escribe un poema": "\n",
    "Extraer: John Smith, 30 años, ingeniero de software": '"age": 30',
    "Explicar la computación cuántica": "cúbits",
}  # fmt: skip
QUESTIONS = list(ANSWERS)


def open_request(server: Server, body: dict[str, Any]) -> socket.socket:
    """Send a request on a bare socket, so that the test decides when to hang up."""
    payload = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    sock.sendall(head.encode() + payload)
    return sock


def test_64_concurrent_streams_are_right_and_none_starves(server: Server) -> None:
    client = server.client()

    def ask(question: str) -> tuple[str, float]:
        pieces, last, gap = [], time.monotonic(), 0.0
        for chunk in client.chat.completions.create(
            model="pyserve-demo", messages=[{"role": "user", "content": question}],
            temperature=0, max_tokens=120, stream=True,
        ):  # fmt: skip
            now = time.monotonic()
            gap, last = max(gap, now - last), now
            pieces.append(chunk.choices[0].delta.content or "")
        return "".join(pieces), gap

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, QUESTIONS * 8))
    wrong = [
        (question, text)
        for question, (text, _) in zip(QUESTIONS * 8, together, strict=True)
        if ANSWERS[question] not in text
    ]
    assert not wrong, wrong[:2]
    assert max(gap for _, gap in together) < 30.0
    server.wait_idle()


def test_a_client_of_one_byte_a_second_among_255_others(server: Server) -> None:
    server.wait_idle()
    asyncio.run(asyncio.wait_for(check_beside_a_slow_client(server.port), 60))
    server.wait_idle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_blocks(server: Server, stream: bool) -> None:
    server.wait_idle()
    before = server.metric("vllm:generation_tokens_total")
    sock = open_request(server, {**LONG, "stream": stream})
    wait_until(lambda: server.metric("vllm:num_requests_running") == 1)
    sock.close()
    server.wait_idle()
    assert server.metric("vllm:generation_tokens_total") - before < LONG["max_tokens"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One runs and one waits, small chunks of prompts."""
    flags = ("--max-num-seqs", "1", "--max-queue", "1", "--max-num-batched-tokens", "16")
    with start_server(tmp_path_factory.mktemp("narrow") / "log", *flags) as running:
        yield running


def test_a_client_that_leaves_the_queue(narrow: Server) -> None:
    """With one slot the second request waits; it leaves the queue when its client does."""
    before = narrow.metric("vllm:generation_tokens_total")
    first = open_request(narrow, {**LONG, "stream": True})
    wait_until(lambda: narrow.metric("vllm:num_requests_running") == 1)
    second = open_request(narrow, LONG)
    wait_until(lambda: narrow.metric("vllm:num_requests_waiting") == 1)
    second.close()
    wait_until(lambda: narrow.metric("vllm:num_requests_waiting") == 0)
    assert narrow.metric("vllm:num_requests_running") == 1
    first.close()
    narrow.wait_idle()
    assert narrow.metric("vllm:generation_tokens_total") - before < LONG["max_tokens"]


def test_a_client_that_leaves_during_prefill(narrow: Server) -> None:
    """Small chunks make the prefill long enough to hang up in the middle of it."""
    prompt = [5 + i % 500 for i in range(1900)]
    sock = open_request(narrow, {**LONG, "prompt": prompt, "max_tokens": 20})
    wait_until(lambda: narrow.metric("vllm:num_requests_running") == 1)
    generated = narrow.metric("vllm:generation_tokens_total")
    sock.close()
    narrow.wait_idle()
    assert narrow.metric("vllm:generation_tokens_total") == generated


def test_mixed_requests_with_aborts_leak_nothing(server: Server) -> None:
    client = server.client()

    def one(number: int) -> None:
        rng = random.Random(number)
        body: dict[str, Any] = {
            "model": "pyserve-demo", "prompt": rng.choice(QUESTIONS), "n": rng.randint(1, 3),
            "max_tokens": rng.randint(1, 60), "temperature": rng.choice([0.7, 1.0]),
            "top_p": rng.choice([0.8, 1.0]), "stream": rng.random() < 0.5,
            "stop": rng.choice([None, ["a"], ["zz", "."]]), "presence_penalty": rng.choice([0, 1]),
            "seed": number,
        }  # fmt: skip
        if rng.random() < 0.2:
            sock = open_request(server, {**body, "max_tokens": 400})
            time.sleep(rng.random() * 0.05)
            sock.close()
        else:
            answer = client.completions.create(**body)
            if body["stream"]:
                reasons = [c.finish_reason for chunk in answer for c in chunk.choices]
                assert sum(reason is not None for reason in reasons) == body["n"]
            else:
                assert all(choice.finish_reason for choice in answer.choices)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(100)))
        server.wait_idle()
        before = server.rss_bytes()
        list(pool.map(one, range(100, 400)))
    server.wait_idle()
    assert server.rss_bytes() - before < 20 * 2**20


def test_penalties_bias_and_minimum_tokens_have_an_effect(client: OpenAI) -> None:
    prompt = "La capital de Francia es"

    def text(**fields: Any) -> str:
        answer = client.completions.create(
            model="pyserve-demo", prompt=prompt, max_tokens=24, temperature=0, extra_body=fields
        )
        return answer.choices[0].text

    plain = text(ignore_eos=True)
    assert text(ignore_eos=True, repetition_penalty=2.0) != plain
    assert text(ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0) != plain
    first = client.completions.create(
        model="pyserve-demo", prompt=prompt, max_tokens=1, temperature=0
    )
    assert first.usage is not None
    short = client.chat.completions.create(
        model="pyserve-demo", messages=[{"role": "user", "content": "Hello!"}], temperature=0,
        max_tokens=60,
    )  # fmt: skip
    assert short.usage is not None and short.usage.completion_tokens < 40
    longer = client.chat.completions.create(
        model="pyserve-demo", messages=[{"role": "user", "content": "Hello!"}], temperature=0,
        max_tokens=60, extra_body={"min_tokens": 50},
    )  # fmt: skip
    assert longer.usage is not None and longer.usage.completion_tokens >= 50


def test_tokens_and_words_that_are_not_allowed_do_not_come(server: Server, client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello!"}]

    def chat(**fields: Any) -> str:
        answer = client.chat.completions.create(
            model="pyserve-demo", messages=messages, temperature=0, max_tokens=12,
            extra_body=fields,
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    plain = chat()
    word = max(re.findall(r"[a-z]+", plain), key=len)
    for words in ([word], [word, plain.split()[0]]):
        text = chat(bad_words=words)
        assert text and not any(re.search(rf"\b{bad}\b", text) for bad in words)
    body = {"prompt": "yes no", "add_special_tokens": False}
    token_ids = json.loads(server.request("POST", "/tokenize", json.dumps(body).encode())[1])
    allowed = chat(allowed_token_ids=token_ids["tokens"])
    assert allowed and set(allowed) <= set("yes no")
    stream = client.chat.completions.create(
        model="pyserve-demo", messages=messages, temperature=0, max_tokens=12, stream=True,
        extra_body={"allowed_token_ids": token_ids["tokens"]},
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == allowed
    with pytest.raises(openai.BadRequestError, match="min_tokens is 5, and after 0 tokens"):
        chat(allowed_token_ids=[3], stop_token_ids=[3], min_tokens=5)
    assert chat() == plain


def test_port_opens_at_once_and_health_answers_all_through_the_start(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready"
    ready_file.write_text("left by a server that was killed")
    started = time.monotonic()
    with start_server(
        tmp_path / "log", "--ready-file", str(ready_file), ready_timeout_s=0
    ) as server:
        seen: list[dict[str, Any]] = []
        slowest, opened_s = 0.0, 0.0
        while not seen or seen[-1]["status"] != "ready":
            assert time.monotonic() - started < 240
            asked = time.monotonic()
            try:
                status, body = server.get("/health")
            except OSError:
                assert server.process.poll() is None, server.log.read_text()
                time.sleep(0.01)
                continue
            opened_s = opened_s or asked - started
            slowest = max(slowest, time.monotonic() - asked)
            seen.append(json.loads(body))
            assert (status == 200) == (seen[-1]["status"] == "ready")
            if len(seen) == 1:
                assert status == 503 and not ready_file.exists()
                assert {"status", "phase", "progress", "eta_s"} <= set(seen[0])
                code, reply = server.request("POST", "/v1/completions", json.dumps(LONG).encode())
                assert code == 503
                assert json.loads(reply)["error"]["type"] == "ServiceUnavailableError"
            time.sleep(max(0.0, asked + 0.05 - time.monotonic()))
        ready_s = time.monotonic() - started
        # 0.5 and 0.25 s on a quiet machine; bench/footprint.py measures them.
        assert opened_s < 10.0 and slowest < 5.0, (opened_s, slowest)
        told = json.loads(ready_file.read_text())
        assert told == {"url": server.url, "model": "pyserve-demo", "pid": server.process.pid}
        log = server.log.read_text()
        assert log.count(f"pyserve is ready on {server.url} (model pyserve-demo, ") == 1
        explained = re.search(r"the start took (start .*) = (\d+\.\d) s", log)
        assert explained, log
        parts = [float(part.split()[1]) for part in explained.group(1).split(" + ")]
        assert abs(sum(parts) - float(explained.group(2))) < 0.05 * len(parts) + 0.06
        assert float(explained.group(2)) > 0.5 * ready_s - 0.3, (explained.group(0), ready_s)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0 and not ready_file.exists()


def test_sigterm_under_64_streams_truncates_none_and_exits_zero(tmp_path: Path) -> None:
    with start_server(tmp_path / "log") as server:
        begun: list[int] = []

        def stream(number: int) -> bytes:
            """The whole stream as it came: to parse 64 of them meanwhile would take seconds."""
            body = {
                "prompt": f"Hello {number}", "max_tokens": 100 if number < 64 else 1500,
                "stream": True, "ignore_eos": True,
            }  # fmt: skip
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            with contextlib.closing(connection), connection.getresponse() as response:
                first = response.read1()
                begun.append(number)
                return first + response.read()

        def watch() -> list[str]:
            """Ask what dashboards and load balancers ask, until nobody answers."""
            seen = []
            while True:
                try:
                    assert server.metric("vllm:num_requests_running") >= 0
                    seen.append(json.loads(server.get("/health")[1])["status"])
                except (OSError, http.client.HTTPException):
                    return seen

        with ThreadPoolExecutor(66) as pool:
            streams = [pool.submit(stream, number) for number in range(64)]
            wait_until(lambda: len(begun) == 64, 30.0)
            # The server may have ended all of them before the last is seen to begin; not this one.
            streams.append(pool.submit(stream, 64))
            wait_until(lambda: len(begun) == 65, 30.0)
            watching = pool.submit(watch)
            server.process.send_signal(signal.SIGTERM)
            ends = [future.result(60) for future in streams]
            seen = watching.result(60)
        for end in ends:
            assert end.count(b'"finish_reason":"length"') == 1 and end.endswith(b"data: [DONE]\n\n")
        assert server.process.wait(20) == 0
        assert "draining" in seen and not set(seen) - {"ready", "draining"}
        log = server.log.read_text()
        assert "Traceback" not in log and "ERROR" not in log, log


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_a_terminal_that_goes_leaves_streams_whole_and_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    ready = tmp_path / "ready"
    # Under nohup the suite has it ignored, and what it starts would too.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with start_server(tmp_path / "log", "--ready-file", str(ready)) as server:
        signal.signal(signal.SIGHUP, before)
        assert ready.exists()
        stream = server.client().completions.create(
            model="pyserve-demo", prompt="Hello", max_tokens=200, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        reasons = [next(iter(stream)).choices[0].finish_reason]
        for sent in (number, signal.SIGHUP)[: 1 + (number == signal.SIGHUP)]:
            server.process.send_signal(sent)
            time.sleep(0.05)
        reasons += [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"
        assert server.process.wait(20) == 0
        assert not ready.exists()


def test_a_server_that_was_suspended_goes_on(server: Server) -> None:
    stream = server.client().completions.create(
        model="pyserve-demo", prompt="Hello", max_tokens=300, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    server.process.send_signal(signal.SIGCONT)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert server.request("GET", "/health")[0] == 200


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    """A paused terminal, a log collector that hangs: the pipe is full from the first line on."""
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(held, b"x" * 4096)
    try:
        with start_server(pipe) as server:
            body = json.dumps({"prompt": "Hello", "max_tokens": 8}).encode()
            seen = Seen()

            def write_logs(target: Target) -> str | None:
                deadline_s = time.monotonic() + 30
                while seen.num_streams < 6 and time.monotonic() < deadline_s:
                    for _ in range(20):
                        assert server.request("POST", "/v1/completions", body)[0] == 200
                return None

            _, problems = asyncio.run(
                run_attack(Endpoint.parse(server.url), None, write_logs, seen)
            )
            assert problems + seen.problems == [] and seen.num_streams >= 6
            longest_s = max(seen.max_gap_s, seen.max_first_s)
            assert longest_s < 5.0, "of a log that blocks there is no end"
            began_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            assert time.monotonic() - began_s < 8.0, "it waits 1 s for its reader, and goes"
    finally:
        os.close(held)


def test_a_full_queue_is_429_and_goes_on_when_there_is_room(narrow: Server) -> None:
    first = open_request(narrow, {**LONG, "stream": True})
    wait_until(lambda: narrow.metric("vllm:num_requests_running") == 1)
    second = open_request(narrow, {**LONG, "max_tokens": 1})
    wait_until(lambda: narrow.metric("vllm:num_requests_waiting") == 1)
    body = json.dumps({**LONG, "max_tokens": 1}).encode()
    status, reply = narrow.request("POST", "/v1/completions", body)
    assert status == 429 and b"the queue is full" in reply
    first.close()
    second.settimeout(10)
    assert second.recv(65536).startswith(b"HTTP/1.1 200 ")
    second.close()
    narrow.wait_idle()
    assert narrow.request("POST", "/v1/completions", body)[0] == 200
    too_many = json.dumps({**LONG, "max_tokens": 1, "n": 3}).encode()
    status, reply = narrow.request("POST", "/v1/completions", too_many)
    assert status == 400 and b"this server takes 1 of one request" in reply


def run_to_the_end(*flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pyserve", "--device", "cpu", "--host", "127.0.0.1", *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=100,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_busy_port(server: Server) -> None:
    code, log = run_to_the_end("--port", str(server.port))
    assert code != 0 and f"port {server.port}" in log


def test_no_such_model_folder(tmp_path: Path) -> None:
    code, log = run_to_the_end("--port", str(free_port()), "--model", str(tmp_path))
    assert code != 0 and "config.json" in log


def test_a_tokenizer_that_makes_its_library_panic(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).symlink_to(ROOT / "pyserve" / "demo" / name)
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    text["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    code, log = run_to_the_end("--port", str(free_port()), "--model", str(tmp_path))
    errors = [line for line in log.splitlines() if " ERROR " in line]
    assert code == 1 and len(errors) == 1
    assert "tokenizer.json: " in errors[0] and "its normalizer" in errors[0]


def test_too_little_memory() -> None:
    code, log = run_to_the_end("--port", str(free_port()), "--gpu-memory-utilization", "1e-9")
    assert code != 0 and "--gpu-memory-utilization" in log


def test_api_key(tmp_path: Path) -> None:
    with start_server(tmp_path / "log", "--api-key", "secret") as server:
        for path in ("/v1/models", "/version", "/metrics", "/tokenize", "/nothing"):
            assert server.get(path)[0] == 401
        assert server.get("/health")[0] == 200
        sdk = OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in sdk.models.list()] == ["pyserve-demo"]
