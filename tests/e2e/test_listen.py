"""The real process behind a Unix socket with a proxy's prefix, and behind TLS for a web page."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.server_process import free_port
from tests.api.tls_files import CERTIFICATE, KEY
from tests.e2e.conftest import ROOT
from tests.waiting import wait_until

READY_TIMEOUT_S = 240
PAGE = "https://chat.example"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Running:
    """A ready server; `tls` set: at localhost, else at a Unix socket."""

    process: subprocess.Popen[str]
    log: Path
    path: Path
    port: int = 0
    tls: ssl.SSLContext | None = None

    def request(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        if self.tls is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "localhost", self.port, timeout=60, context=self.tls
            )
        else:
            connection = http.client.HTTPConnection("localhost", timeout=60)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(60)
        try:
            if self.tls is None:
                connection.sock.connect(str(self.path))
            data = None if body is None else json.dumps(body)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, {"Content-Type": "application/json", **named})
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> str:
        """The signal must end it cleanly; what it has logged."""
        self.process.send_signal(number)
        assert self.process.wait(20) == 0, self.log.read_text()
        return self.log.read_text()


@contextmanager
def start(running: Running, *flags: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "pyserve", "--device", "cpu", *flags]
    with running.log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, text=True, cwd=ROOT)
        running.process = process

        def is_ready() -> bool:
            assert process.poll() is None, running.log.read_text()
            with suppress(OSError):
                return running.request("GET", "/health")[0] == 200
            return False

        try:
            wait_until(is_ready, READY_TIMEOUT_S, pause_s=0.05, explain=running.log.read_text)
            yield running
        finally:
            process.kill()
            process.wait(30)


def test_a_unix_socket_a_prefix_and_a_file_of_flags(tmp_path: Path) -> None:
    path, config = tmp_path / "s", tmp_path / "serve.yaml"
    with socket.socket(socket.AF_UNIX) as dead:  # as a killed server leaves it
        dead.bind(str(path))
    config.write_text(f"uds: {path}\nroot-path: /llm\nserved-model-name: [mine, demo]\nenv: [A=b]")
    running = Running(None, tmp_path / "log", path)  # type: ignore[arg-type]
    with start(running, "--config", str(config), "--env", "VLLM_API_KEY=sesame"):
        for prefix in ("", "/llm"):
            status, _, body = running.request(
                "POST", f"{prefix}/v1/completions", {"prompt": "Hello", "max_tokens": 4},
                Authorization="Bearer sesame",
            )  # fmt: skip
            assert (status, json.loads(body)["model"]) == (200, "mine")
            assert running.request("GET", f"{prefix}/health")[0] == 200
            assert running.request("GET", f"{prefix}/v1/models")[0] == 401
        assert running.request("GET", "/other/health")[0] == 401
        document = json.loads(running.request("GET", "/llm/openapi.json")[2])
        assert document["servers"][0]["url"] == "/llm"
        status, _, body = running.request(
            "POST", "/llm/v1/chat/completions",
            {"model": "demo", "messages": QUESTION, "temperature": 0},
            Authorization="Bearer sesame",
        )  # fmt: skip
        assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]
        log = running.stop(signal.SIGQUIT)
    assert f"pyserve is ready on unix:{path} (model mine" in log
    assert not path.exists()


def test_tls_for_a_named_page(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(CERTIFICATE)
    key.write_text(KEY)
    trust = ssl.create_default_context(cafile=str(cert))
    port = free_port()
    running = Running(None, tmp_path / "log", tmp_path, port, trust)  # type: ignore[arg-type]
    with start(
        running, "--host", "127.0.0.1", "--port", str(port), "--ssl-certfile", str(cert),
        "--ssl-keyfile", str(key), "--allowed-origins", json.dumps([PAGE]), "--api-key", "k",
    ):  # fmt: skip
        asking = {"Origin": PAGE, "Access_Control_Request_Method": "POST"}
        status, headers, _ = running.request("OPTIONS", "/v1/chat/completions", **asking)
        assert (status, headers["Access-Control-Allow-Origin"]) == (204, PAGE)
        status, headers, body = running.request(
            "POST", "/v1/chat/completions",
            {"messages": QUESTION, "temperature": 0, "stream": True},
            Origin=PAGE, Authorization="Bearer k",
        )  # fmt: skip
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE)
        assert body.endswith(b"data: [DONE]\n\n")
        _, headers, _ = running.request("GET", "/health", Origin="https://evil.example")
        assert "Access-Control-Allow-Origin" not in headers
        old = ssl.create_default_context(cafile=str(cert))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        running.tls = old
        assert running.request("GET", "/health")[0] == 200
        # Plain HTTP gets no answer, and the server lives on.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with suppress(ConnectionError):
                assert not plain.recv(1000).startswith(b"HTTP")
        assert running.request("GET", "/health")[0] == 200
        log = running.stop()
    assert f"pyserve is ready on https://127.0.0.1:{port}" in log
    assert "Traceback" not in log
