"""Several processes that share each layer of the demo model: the same answers, and one end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.lost_rank import followers_of
from bench.server_process import free_port
from tests.e2e.conftest import ROOT, Server, start_server
from tests.e2e.test_life import LONG
from tests.model import peft
from tests.waiting import wait_until

FLAGS = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
PROMPT = "The quick brown fox"
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "echo": True,
                         "logprobs": 3}),
    ("/v1/completions", {"prompt": [PROMPT, PROMPT + "es"], "n": 3, "seed": 5, "max_tokens": 24}),
    ("/v1/completions", {"prompt": PROMPT * 40, "temperature": 0, "max_tokens": 8,
                         "presence_penalty": 1.5}),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Extraer: John Smith, 30 años"}], "seed": 7,
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}
        },
    }),
    ("/v1/completions", {"prompt": PROMPT, "model": "extra", "temperature": 0, "max_tokens": 16,
                         "logprobs": 2}),
]  # fmt: skip


def answers(server: Server, questions: list[tuple[str, Any]] = QUESTIONS) -> list[Any]:
    return [
        server.json(path, {"model": "pyserve-demo"} | body)["choices"] for path, body in questions
    ]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """With an adapter of each kind of matrix."""
    shapes = {}
    for layer in range(8):
        for name, shape in (
            ("mlp.down", (256, 576)),
            ("mlp.up", (576, 256)),
            ("self_attn.k", (128, 256)),
            ("self_attn.o", (256, 256)),
        ):
            shapes[f"model.layers.{layer}.{name}_proj"] = shape
    folder = peft.write_adapter(tmp_path_factory.mktemp("adapter") / "extra", shapes, size=1.0)
    return (*FLAGS, "--enable-lora", "--lora-modules", f"extra={folder}")


@pytest.fixture(scope="module")
def expected(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process answers."""
    with start_server(tmp_path_factory.mktemp("one") / "log", *flags) as alone:
        found = answers(alone)
    plain, adapted = found[0][0]["text"].removeprefix(PROMPT), found[-1][0]["text"]
    assert not plain.startswith(adapted), "the adapter changes something"
    return found


def assert_close(one: Any, other: Any) -> None:
    """Equal but for the rounding of numbers."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3)
    else:
        assert one == other


def check_sleep(server: Server, expected: list[Any], levels: tuple[int, ...]) -> None:
    """All ranks give their memory back and take it again, and answer as before."""
    for level in levels:
        assert server.json(f"/sleep?level={level}", {})["level"] == level
        server.json("/wake_up", {})
        assert_close(answers(server, QUESTIONS[: len(expected)]), expected)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_the_answers_of_one_process(
    tp_size: int, flags: tuple[str, ...], expected: list[Any], tmp_path: Path
) -> None:
    """With 4, two ranks hold each KV head."""
    size = ("--tensor-parallel-size", str(tp_size))
    with start_server(tmp_path / "log", *flags, *size) as server:
        assert len(followers_of(server.process.pid)) == tp_size - 1
        if tp_size == 2:
            for _ in range(2):  # prompts are in the prefix cache then
                assert_close(answers(server), expected)
            check_sleep(server, expected, (1, 2, 2))
        else:  # each answer takes long on the cores of a small machine
            assert_close(answers(server, QUESTIONS[:1]), expected[:1])
            check_sleep(server, expected[:1], (2,))
        all_ids = followers_of(server.process.pid)
        os.kill(all_ids[0], signal.SIGTERM)  # as a service manager sends it to all
        if tp_size == 2:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(15) == 0
        else:
            server.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in all_ids), timeout_s=5)
    log = (tmp_path / "log").read_text()
    assert f"rank {tp_size - 1} of {tp_size} holds its part of each layer on cpu" in log
    num_loads = 3 if tp_size == 2 else 2  # at the start, and from level 2
    assert log.count(f"rank {tp_size - 1} has loaded its part in") == num_loads
    assert "Traceback" not in log


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Server]:
    with start_server(tmp_path / "log", *FLAGS, "--tensor-parallel-size", "2") as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_all(pair: Server, number: signal.Signals) -> None:
    """Streams end with an error, the exit code says that it failed, and nobody is left."""
    [other] = followers_of(pair.process.pid)
    ends: list[str] = []

    def stream() -> None:
        with suppress(OSError):
            body = json.dumps(LONG | {"max_tokens": 900, "stream": True}).encode()
            _, reply = pair.request("POST", "/v1/completions", body)
            ends.append(reply.decode())

    streams = [threading.Thread(target=stream) for _ in range(4)]
    for thread in streams:
        thread.start()
    wait_until(lambda: pair.metric("vllm:num_requests_running") == len(streams))
    began_s = time.monotonic()
    os.kill(other, number)
    for thread in streams:
        thread.join(30)
    took_s = time.monotonic() - began_s
    assert pair.process.wait(15) == 1
    assert not Path(f"/proc/{other}").exists()
    why = "rank 1 was ended by SIGKILL" if number == signal.SIGKILL else "rank 1 hangs"
    assert len(ends) == len(streams)
    assert all(f'"message":"{why}' in end for end in ends), ends[0][-300:]
    assert took_s < (2 if number == signal.SIGKILL else 6)
    log = pair.log.read_text()
    assert why in log and "Traceback" not in log


@contextmanager
def two_nodes(folder: Path, *flags: str) -> Iterator[tuple[Server, list[subprocess.Popen[str]]]]:
    """A server, ready, and the agents of torchrun, each with a process; here on one machine."""
    meeting, port = free_port(), free_port()
    flags = (*FLAGS, *flags, "--device", "cpu", "--port", str(port))
    with (folder / "log").open("w") as sink, ExitStack() as stack:
        agents = []
        for node in range(2):
            where = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
            where += ["--master-addr", "127.0.0.1", "--master-port", str(meeting)]
            agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *where, "-m", "pyserve", *flags],
                cwd=ROOT, stdout=sink, stderr=sink, text=True,
            )  # fmt: skip
            stack.callback(agent.wait)
            stack.callback(agent.kill)
            agents.append(agent)
        server = Server(agents[0], port, folder / "log")
        server.wait_ready(120)
        yield server, agents


@pytest.mark.parametrize(
    ("way", "held"), [("tensor", "its part of each layer"), ("pipeline", "its layers")]
)
def test_two_nodes_of_torchrun(way: str, held: str, expected: list[Any], tmp_path: Path) -> None:
    with two_nodes(tmp_path, f"--{way}-parallel-size", "2") as (server, agents):
        assert_close(answers(server, QUESTIONS[:4]), expected[:4])
        check_sleep(server, expected[:4], (1, 2) if way == "tensor" else (2,))
        leader, other = (children_of(agent.pid)[0] for agent in agents)
        if way == "tensor":
            os.kill(other, signal.SIGKILL)
            assert all(agent.wait(60) != 0 for agent in agents)
        else:
            os.kill(leader, signal.SIGTERM)
            assert all(agent.wait(60) == 0 for agent in agents)
        log = without_agents(server.log.read_text())
        assert f"rank 1 of 2 holds {held} on cpu" in log
        assert ("rank 1 has gone; exiting" in log) == (way == "tensor")
        assert way == "tensor" or "Traceback" not in log


def without_agents(log: str) -> str:
    """A log without what torchrun's agents write: one whose peer leaves first tells of an error."""
    lines = log.splitlines()
    return "\n".join(line for line in lines if "torch/distributed/elastic/" not in line)


def children_of(pid: int) -> list[int]:
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in paths for word in path.read_text().split()]


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    """Before any process is started."""
    flags = ["--model", str(tmp_path), "--tensor-parallel-size", "4", "--device", "cpu"]
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 8, "vocab_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(ROOT / "pyserve" / "demo" / name)
    done = subprocess.run(
        [sys.executable, "-m", "pyserve", *flags, "--port", "0", "--load-format", "dummy"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert "--tensor-parallel-size 4: 6 heads, 2 KV heads" in done.stderr
    assert "can be shared by 1, 2 cards" in done.stderr
