"""What a renter's guide to vLLM tells them to type, with pyserve in vLLM's place.

The model names are the guide's: they stand for copies of the demo model in the working folder, of
which the config promises a longer context. Its docker and pip lines are not run here.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from bench.server_process import free_port
from tests.e2e.conftest import ROOT, Server
from tests.model import peft

DEMO = ROOT / "pyserve" / "demo"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
DEEPSEEK = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
MODELS = (MISTRAL, DEEPSEEK, LLAMA)
PRODUCTION = (
    f"vllm serve {MISTRAL} --host 0.0.0.0 --port 8000 --tensor-parallel-size 1 "
    "--max-model-len 8192 --gpu-memory-utilization 0.9 --max-num-seqs 256 --enable-prefix-caching"
)
START_LINES = {
    "basic": f"vllm serve {MISTRAL} --host 0.0.0.0 --port 8000",
    "module": f"python -m vllm.entrypoints.openai.api_server --model {MISTRAL} --host 0.0.0.0",
    "longer context": f"vllm serve {DEEPSEEK} --host 0.0.0.0 --port 8000 --max-model-len 16384",
    "token": f"vllm serve {LLAMA} --host 0.0.0.0 --env HUGGING_FACE_HUB_TOKEN=hf_xxxxx",
    "less memory": f"vllm serve {MISTRAL} --gpu-memory-utilization 0.8 --max-model-len 4096 "
    "--max-num-seqs 64",
    "tools": f"vllm serve {MISTRAL} --host 0.0.0.0 --enable-auto-tool-choice "
    "--tool-call-parser mistral",
    "two ranks": f"vllm serve {DEEPSEEK} --host 0.0.0.0 --port 8000 --tensor-parallel-size 2 "
    "--max-model-len 32768 --gpu-memory-utilization 0.90",
    "four ranks": f"vllm serve {DEEPSEEK} --port 8000 --tensor-parallel-size 4 "
    "--max-model-len 32768",
    "4 bits": f"vllm serve {MISTRAL} --host 0.0.0.0 --quantization awq",
}
ADAPTERS = (
    f"vllm serve {LLAMA} --host 0.0.0.0 --enable-lora --lora-modules sql-adapter=path/to/sql-lora "
    "code-adapter=path/to/code-lora chat-adapter=path/to/chat-lora --max-lora-rank 64"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the guide's names are models."""
    path = tmp_path_factory.mktemp("guide")
    config = json.loads((DEMO / "config.json").read_text())
    for name in MODELS:
        model = path / name
        model.mkdir(parents=True)
        for file in DEMO.iterdir():
            if file.suffix in (".json", ".jinja", ".safetensors"):
                os.symlink(file, model / file.name)
        (model / "config.json").unlink()
        config["max_position_embeddings"] = 32768
        (model / "config.json").write_text(json.dumps(config))
    return path


def command_of(line: str, port: int) -> list[str]:
    """pyserve's words for a line of the guide, on a port that is free here."""
    words = shlex.split(line.replace("--port 8000", ""))
    words = words[1:] if words[0] == "vllm" else words[3:]
    # On a machine with a card tests/gpu serves from it.
    return [sys.executable, "-m", "pyserve", *words, "--port", str(port), "--device", "cpu"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@contextmanager
def started(line: str, folder: Path, log: Path) -> Iterator[Server]:
    port = free_port()
    with log.open("w") as sink:
        process = subprocess.Popen(
            command_of(line, port), stdout=sink, stderr=sink, text=True, cwd=folder,
            env=environment(),
        )  # fmt: skip
        server = Server(process, port, log)
        try:
            yield server
        finally:
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(PRODUCTION, folder, tmp_path_factory.mktemp("log") / "log") as running:
        running.wait_ready(240)
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="not-needed", max_retries=0) as sdk:
        yield sdk


def curl(server: Server, path: str, body: str | None = None) -> bytes:
    """As the guide asks: `curl URL`, or with a body and its type."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("there is no curl")
    command = [program, "--silent", "--show-error", "--fail", "--max-time", "60"]
    command.append(server.url + path)
    if body is not None:
        command += ["-H", "Content-Type: application/json", "-d", body]
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("name", START_LINES)
def test_start_lines(name: str, folder: Path, tmp_path: Path) -> None:
    line = START_LINES[name]
    model = next(model for model in MODELS if model in line)
    with started(line, folder, tmp_path / "log") as server:
        phases: set[str] = set()
        deadline = time.monotonic() + 240
        while True:  # /health while it starts: no connection is refused once the port is open
            try:
                status, body = server.get("/health")
            except OSError:
                assert not phases and server.process.poll() is None, server.log.read_text()
                assert time.monotonic() < deadline, "nobody listens"
                time.sleep(0.02)
                continue
            if status == 200:
                break
            assert time.monotonic() < deadline, body
            assert status == 503 and json.loads(body)["status"] == "starting"
            phases.add(json.loads(body)["phase"])
            time.sleep(0.02)
        assert phases
        (served,) = json.loads(server.get("/v1/models")[1])["data"]
        assert served["id"] == model
        if "--max-model-len" in line:
            assert f"--max-model-len {served['max_model_len']}" in line
        answer = server.json("/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 4})
        assert answer["usage"]["completion_tokens"] >= 1
        assert "hf_xxxxx" not in server.log.read_text()


def test_adapters(folder: Path, tmp_path: Path) -> None:
    """The guide's example as it stands, with adapters of made-up weights under its names."""
    shapes = {}
    for layer in range(8):
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (256, 576)
        shapes[f"model.layers.{layer}.self_attn.q_proj"] = (256, 256)
    for seed, name in enumerate(("sql", "code", "chat")):
        peft.write_adapter(folder / f"path/to/{name}-lora", shapes, seed=seed, size=2.0)
    asks = {
        "sql-adapter": "Escribe una consulta SQL para encontrar los 10 mejores clientes",
        "code-adapter": "Escribe una función en Python para ordenar una lista",
    }
    with started(ADAPTERS, folder, tmp_path / "log") as server:
        server.wait_ready(240)
        listed = json.loads(server.get("/v1/models")[1])["data"]
        names = ["sql-adapter", "code-adapter", "chat-adapter"]
        assert [model["id"] for model in listed] == [LLAMA, *names]
        assert {model["parent"] for model in listed[1:]} == {LLAMA}
        client = OpenAI(base_url=f"{server.url}/v1", api_key="not-needed", max_retries=0)
        said = set()
        for model in (*names, LLAMA):
            ask = asks.get(model, "Hola")
            response = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": ask}], max_tokens=8,
            )  # fmt: skip
            assert response.model == model
            said.add(response.choices[0].message.content)
        assert len(said) == 4
        client.close()
        assert b"vllm:lora_requests_info" in server.get("/metrics")[1]


def test_health_and_models(server: Server) -> None:
    curl(server, "/health")
    models = json.loads(curl(server, "/v1/models"))
    assert [model["id"] for model in models["data"]] == [MISTRAL]
    assert models["data"][0]["max_model_len"] == 8192


@pytest.mark.parametrize("limit", ["", ', "max_tokens": 100'], ids=["no limit", "limit"])
def test_chat_by_curl(server: Server, limit: str) -> None:
    messages = '[{"role": "user", "content": "¡Hola!"}]'
    body = f'{{"model": "{MISTRAL}", "messages": {messages}{limit}}}'
    choice = json.loads(curl(server, "/v1/chat/completions", body))["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]


def test_completion_by_curl(server: Server) -> None:
    body = f'{{"model": "{MISTRAL}", "prompt": "La capital de Francia es", "max_tokens": 50}}'
    answer = json.loads(curl(server, "/v1/completions", body))
    assert answer["choices"][0]["text"] and answer["usage"]["completion_tokens"] <= 50


def test_tokenize_and_back_by_curl(server: Server) -> None:
    body = f'{{"model": "{MISTRAL}", "prompt": "Hello world"}}'
    tokens = json.loads(curl(server, "/tokenize", body))
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 8192
    body = json.dumps({"model": MISTRAL, "tokens": tokens["tokens"]})
    assert "Hello world" in json.loads(curl(server, "/detokenize", body))["prompt"]


def test_utility_routes_by_curl(server: Server) -> None:
    assert json.loads(curl(server, "/version"))["version"]
    assert b"vllm:num_requests_running" in curl(server, "/metrics")
    assert b"<html" in curl(server, "/docs").lower()


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("Explicar la computación cuántica", {"max_tokens": 500, "temperature": 0.7}),
        ("Resolver: Si un tren viaja 120km en 1.5 horas, ¿cuál es su velocidad en m/s?",
         {"max_tokens": 2048, "temperature": 0.6}),
    ],
    ids=["chat", "reasoning"],
)  # fmt: skip
def test_chat_by_sdk(client: OpenAI, content: str, fields: dict[str, Any]) -> None:
    messages: Any = [{"role": "user", "content": content}]
    response = client.chat.completions.create(model=MISTRAL, messages=messages, **fields)
    assert response.choices[0].message.content


def test_stream_by_sdk(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MISTRAL, messages=[{"role": "user", "content": "Escribe un poema"}], stream=True
    )
    # The guide's loop reads choices[0] of every chunk.
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(piece for piece in pieces if piece)


def test_a_person_by_schema(client: OpenAI) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "occupation": {"type": "string"},
        },
        "required": ["name", "age", "occupation"],
    }
    response = client.chat.completions.create(
        model=MISTRAL,
        messages=[
            {"role": "user", "content": "Extraer: John Smith, 30 años, ingeniero de software"}
        ],
        response_format={
            "type": "json_schema", "json_schema": {"name": "person", "schema": schema},
        },
        temperature=0,
    )  # fmt: skip
    person = json.loads(response.choices[0].message.content or "")
    assert person == {"name": "John Smith", "age": 30, "occupation": "ingeniero de software"}


@pytest.mark.parametrize("adapter", ["sql-adapter", "code-adapter"])
def test_adapters_of_later_versions_are_unknown_models(client: OpenAI, adapter: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(
            model=adapter, messages=[{"role": "user", "content": "Escribe una consulta SQL"}]
        )
    assert adapter in str(caught.value)
