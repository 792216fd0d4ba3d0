"""Servers whose ranks have a card each, beside one that has all of the model on one card.

Skipped where torch sees fewer than two cards.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_adapters import write_adapter
from bench.lost_rank import kill_one
from bench.server_process import ServerProcess, running_server
from pyserve.config import DEMO_MODEL
from pyserve.model.config import ModelConfig
from tests.gpu.test_server import ANSWERS, MODEL, ROOT, SMALL

READY_S = 120
PROMPT = "The quick brown fox jumps over the lazy dog and runs. " * 8
SIZES = (2, 4)  # the demo model has four heads
MAX_ERROR = 0.06  # of a log probability: both compute in bfloat16, and add up in another order
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "-m", "pyserve",
)  # fmt: skip
pytestmark = pytest.mark.timeout(300)


def ask(server: ServerProcess, path: str, body: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", path, json.dumps({"model": MODEL} | body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    reply = response.read()
    assert response.status == 200, reply
    return json.loads(reply)


def prompt_logprobs(server: ServerProcess, model: str = MODEL) -> list[float]:
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "echo": True,
        "logprobs": 1,
    }  # fmt: skip
    choice = ask(server, "/v1/completions", body)["choices"][0]
    values: list[float] = choice["logprobs"]["token_logprobs"]
    return values[1:-1]


def answer(server: ServerProcess, question: str) -> str:
    body = {
        "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 120,
    }  # fmt: skip
    text: str = ask(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def expected() -> list[float]:
    with running_server(SMALL, folder=ROOT) as alone:
        alone.wait_ready(READY_S)
        return prompt_logprobs(alone)


def check(server: ServerProcess, expected: list[float]) -> None:
    logprobs = prompt_logprobs(server)
    errors = [abs(a - b) for a, b in zip(logprobs, expected, strict=True)]
    assert max(errors) < MAX_ERROR * max(1.0, -min(expected)), max(errors)


def check_all(server: ServerProcess, expected: list[float]) -> None:
    """Cold, from the prefix cache, and after each way to sleep."""
    for _ in range(2):
        check(server, expected)
    for level in (1, 2):
        ask(server, f"/sleep?level={level}", {})
        ask(server, "/wake_up", {})
        check(server, expected)
    for question, part in ANSWERS.items():
        assert part in answer(server, question), question


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("flags", [("--enforce-eager",), ()], ids=["eager", "graphs"])
def test_the_answers_of_one_card(
    tp_size: int, flags: tuple[str, ...], expected: list[float]
) -> None:
    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"fewer than {tp_size} cards")
    flags = (*SMALL, "--tensor-parallel-size", str(tp_size), *flags)
    with running_server(flags, folder=ROOT) as server:
        server.wait_ready(READY_S)
        check_all(server, expected)
        body = {"prompt": PROMPT, "max_tokens": 48, "seed": 3, "ignore_eos": True}
        texts = {ask(server, "/v1/completions", body)["choices"][0]["text"] for _ in range(3)}
        assert len(texts) == 1, "a seed gives one answer"
        log = Path(server.log).read_text()
        assert "Traceback" not in log and "the ledger says" in log
        assert server.stop() < 20 and server.process.returncode == 0


@pytest.mark.parametrize("way", ["pipeline", "tensor", "what is measured"])
def test_two_cards_under_torchrun(way: str, expected: list[float]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than 2 cards")
    flags = SMALL if " " in way else (*SMALL, f"--{way}-parallel-size", "2")
    with running_server(flags, command=TORCHRUN, folder=ROOT) as server:
        server.wait_ready(READY_S)
        check_all(server, expected)
        log = Path(server.log).read_text()
        assert "Traceback" not in log and "the ledger says" in log
        assert ("an all-reduce of 2 ranks takes" in log) == (" " in way)


def test_adapters_on_two_cards(tmp_path: Path) -> None:
    """What one card says of a prompt with each adapter, before they sleep and after."""
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than 2 cards")
    config = ModelConfig.from_path(DEMO_MODEL)
    names = [f"a{number}" for number in range(3)]
    folders = [write_adapter(tmp_path / name, config) for name in names]
    modules = [f"{name}={folder}" for name, folder in zip(names, folders, strict=True)]
    flags = (*SMALL, "--enable-lora", "--max-loras", "2", "--lora-modules", *modules)
    seen = []
    for size in ("1", "2"):
        with running_server((*flags, "--tensor-parallel-size", size), folder=ROOT) as server:
            server.wait_ready(READY_S)
            for _ in range(2):  # three take turns in two slots
                seen.append([prompt_logprobs(server, name) for name in (MODEL, *names)])
            ask(server, "/sleep?level=1", {})
            ask(server, "/wake_up", {})
            seen.append([prompt_logprobs(server, name) for name in (MODEL, *names)])
    alone = seen[0]
    for several in seen[1:]:
        for exact, logprobs in zip(alone, several, strict=True):
            errors = [abs(a - b) for a, b in zip(logprobs, exact, strict=True)]
            assert max(errors) < MAX_ERROR * max(1.0, -min(exact)), max(errors)
    for one, other in itertools.combinations(alone, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1, "all are different"


def test_a_rank_that_is_killed_ends_all() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than 2 cards")
    chance = random.Random(0)
    for _ in range(3):
        with running_server((*SMALL, "--tensor-parallel-size", "2"), folder=ROOT) as server:
            server.wait_ready(READY_S)
            seen_s, wrong = kill_one(server, 64, chance)
            assert not wrong, (seen_s, wrong)
