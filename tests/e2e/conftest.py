"""The real server process with the demo model, started once for all end-to-end tests."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from bench.server_process import free_port
from pyserve.config import DEMO_MODEL
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
THINKER = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
# The guide's tool.
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Obtener el clima actual de una ciudad",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Nombre de la ciudad"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


@dataclass
class Server:
    """One running `python -m pyserve` on a free loopback port."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def get(self, path: str) -> tuple[int, bytes]:
        return self.request("GET", path)

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, body, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def json(self, path: str, body: object) -> Any:
        """POST `body`; the reply must be a 200."""
        status, reply = self.request("POST", path, json.dumps(body).encode())
        assert status == 200, reply
        return json.loads(reply)

    def metric(self, name: str) -> float:
        """Sum of a sample's values over its labels."""
        _, text = self.get("/metrics")
        families = text_string_to_metric_families(text.decode())
        values = [s.value for family in families for s in family.samples if s.name == name]
        assert values, f"{name} is not exported"
        return sum(values)

    def rss_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def wait_ready(self, timeout_s: float) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"server died:\n{self.log.read_text()}"
            with suppress(OSError):
                return self.get("/health")[0] == 200
            return False

        wait_until(is_ready, timeout_s, pause_s=0.05, explain=self.log.read_text)

    def wait_idle(self) -> None:
        """Until no request runs or waits and no KV block is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        wait_until(lambda: not any(self.metric(f"vllm:{name}") for name in names), pause_s=0.02)


@contextmanager
def start_server(log: Path, *flags: str, ready_timeout_s: float = 240) -> Iterator[Server]:
    """Run the server; kill it at the end. The first start on a machine compiles the ops."""
    port = free_port()
    # On a machine with a card tests/gpu serves from it; several servers do not fit beside it.
    command = [sys.executable, "-m", "pyserve", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, text=True, cwd=ROOT)
        server = Server(process, port, log)
        try:
            if ready_timeout_s:
                server.wait_ready(ready_timeout_s)
            yield server
        finally:
            process.kill()
            process.wait(30)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In float32: greedy answers do not depend on what else is in the batch. Also by the name of
    the guide's model that thinks, and with chat templates of requests."""
    flags = ["--model", str(DEMO_MODEL), "--served-model-name", "pyserve-demo", THINKER]
    flags += ["--dtype", "float32", "--trust-request-chat-template"]
    with start_server(tmp_path_factory.mktemp("exact") / "log", *flags) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as sdk:
        yield sdk
