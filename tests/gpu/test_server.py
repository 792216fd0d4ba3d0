"""The real server process on the card with the demo model, and what becomes of it when things
break: CUDA errors, kernels that hang, no card, a card that is full.

Plain HTTP, no SDK: the machine with the card may have none.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.make_model import make_model
from bench.server_process import PYSERVE, ServerProcess, running_server
from tests.e2e.slow_client import check_beside_a_slow_client
from tests.gpu.broken_server import DEADLINE_S
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
MODEL = "pyserve-demo"
SMALL = ("--device", "cuda", "--kv-cache-memory-bytes", str(2**30))  # several fit beside each other
# Question -> what a right answer holds, whatever rounding does to its wording.
ANSWERS = {
    "What is the capital of France?": "Paris", "¿Cuál es la capital de España?": "Madrid",
    "What is the capital of Japan?": "Tokyo", "What is 12 + 30?": "42",
    "Repeat: the quick brown fox": "the quick brown fox", "Escribe un poema": "\n",
    "Extraer: John Smith, 30 años, ingeniero de software": '"age": 30',
    "Explicar la computación cuántica": "cúbits",
}  # fmt: skip
READY_TIMEOUT_S = 60
EXIT_TIMEOUT_S = 10
ASSERT = ("device-side assert", "CUDA_ERROR_ASSERT")  # as the runtime and as the driver say it


@contextmanager
def server_on_card(
    *flags: str, command: Sequence[str] = PYSERVE, environment: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    with running_server(flags, command=command, environment=environment, folder=ROOT) as running:
        running.wait_ready(READY_TIMEOUT_S)
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_on_card(*SMALL) as running:
        yield running


def post(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        server.url + path,
        json.dumps({"model": MODEL, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        reply: dict[str, Any] = json.load(response)
    return reply


def chat(server: ServerProcess, question: str, **fields: Any) -> dict[str, Any]:
    body = {"temperature": 0, "max_tokens": 120, **fields}
    return post(
        server, "/v1/chat/completions", messages=[{"role": "user", "content": question}], **body
    )


def text_of(reply: dict[str, Any]) -> str:
    content: str = reply["choices"][0]["message"]["content"]
    return content


def stream(server: ServerProcess, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    """Frames until [DONE], which must come."""
    request = urllib.request.Request(
        server.url + path,
        json.dumps({"model": MODEL, "stream": True, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    raise AssertionError("the stream ended without [DONE]")


def health(server: ServerProcess) -> int:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=5) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{")]
    assert values, f"{name} is not exported"
    return sum(values)


@pytest.mark.parametrize("question", ANSWERS)
def test_sensible_answers(server: ServerProcess, question: str) -> None:
    reply = chat(server, question)
    assert ANSWERS[question] in text_of(reply)
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_text_completion(server: ServerProcess) -> None:
    reply = post(
        server, "/v1/completions", prompt="La capital de Francia es", max_tokens=8, temperature=0
    )
    assert "París" in reply["choices"][0]["text"]


def test_a_stream_says_what_the_whole_says(server: ServerProcess) -> None:
    question = "What is the capital of France?"
    whole = chat(server, question, cache_salt="a")
    frames = list(
        stream(
            server, "/v1/chat/completions", messages=[{"role": "user", "content": question}],
            temperature=0, max_tokens=120, cache_salt="b", stream_options={"include_usage": True},
        )
    )  # fmt: skip
    choices = [choice for frame in frames for choice in frame["choices"]]
    assert "".join(c["delta"].get("content") or "" for c in choices) == text_of(whole)
    assert choices[-1]["finish_reason"] == "stop"
    assert frames[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_greedy_answers_do_not_change_from_run_to_run(server: ServerProcess) -> None:
    """Alone and with nothing cached: the same shapes, so the same bits."""
    texts = [
        [text_of(chat(server, question, cache_salt=f"run {run}")) for question in ANSWERS]
        for run in range(3)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_64_at_once_are_right_and_take_no_memory_from_the_card(server: ServerProcess) -> None:
    before = metric(server, "pyserve:device_allocations")
    questions = list(ANSWERS) * 8
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda question: text_of(chat(server, question)), questions))
    wrong = [(q, t) for q, t in zip(questions, texts, strict=True) if ANSWERS[q] not in t]
    assert not wrong, wrong[:3]
    assert metric(server, "pyserve:device_allocations") == before
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_a_client_of_one_byte_a_second_among_255_others(server: ServerProcess) -> None:
    before = metric(server, "pyserve:device_allocations")
    asyncio.run(asyncio.wait_for(check_beside_a_slow_client(server.port), 60))
    wait_until(lambda: not metric(server, "vllm:num_requests_running"), 10)
    assert metric(server, "vllm:kv_cache_usage_perc") == 0
    assert metric(server, "pyserve:device_allocations") == before


def test_a_prompt_seen_before_comes_from_the_cache(server: ServerProcess) -> None:
    question = "Repeat: " + "one two three four five " * 12
    first, second = (chat(server, question, max_tokens=2) for _ in range(2))
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (second["usage"]["prompt_tokens"] - 1) // 16 * 16 > 0
    assert text_of(first) == text_of(second)


def test_several_choices(server: ServerProcess) -> None:
    fields = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 48}
    reply = chat(server, "Escribe un poema", **fields)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in reply["choices"]}) > 1


def test_sigterm_under_64_streams_truncates_none_and_exits_zero() -> None:
    body = {"max_tokens": 1900, "ignore_eos": True, "stream_options": {"include_usage": True}}
    begun: list[int] = []

    def whole(server: ServerProcess, number: int) -> tuple[str | None, int]:
        """Finish reason, and tokens by the last frame's count."""
        reason, num_tokens = None, 0
        for frame in stream(server, "/v1/completions", prompt=f"Hello {number}", **body):
            if reason is None:
                begun.append(number)
            assert "error" not in frame, frame
            for choice in frame["choices"]:
                reason = choice["finish_reason"]
            if frame.get("usage"):
                num_tokens = frame["usage"]["completion_tokens"]
        return reason, num_tokens

    with server_on_card(*SMALL) as server:
        with ThreadPoolExecutor(64) as pool:
            streams = [pool.submit(whole, server, number) for number in range(64)]
            wait_until(lambda: len(set(begun)) == 64, 30, pause_s=0.001)
            server.process.send_signal(signal.SIGTERM)
            ends = [future.result(60) for future in streams]
        code = server.process.wait(EXIT_TIMEOUT_S)
        log = server.log.read_text()
    assert ends == [("length", 1900)] * 64
    assert code == 0, log[-3000:]
    assert "Traceback" not in log and not error_lines(log), log[-3000:]


def run_to_the_end(
    *flags: str, environment: dict[str, str] | None = None, timeout_s: float = 60
) -> tuple[int, str]:
    """Exit code and log of a server that must not come up."""
    with running_server(flags, environment=environment, folder=ROOT) as server:
        code = server.process.wait(timeout_s)
        log = server.log.read_text()
    assert "Traceback" not in log, log
    return code, log


def error_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "ERROR" in line]


def test_no_card_is_visible() -> None:
    code, log = run_to_the_end("--device", "cuda", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert code == 1
    [line] = error_lines(log)
    assert "CUDA_VISIBLE_DEVICES" in line


def test_a_head_dim_that_no_kernel_has(tmp_path: Path) -> None:
    changes = {"head_dim": 96, "hidden_size": 384}
    make_model(tmp_path / "model", "tiny", changes, has_weights=False)
    code, log = run_to_the_end(
        "--model", str(tmp_path / "model"), "--load-format", "dummy", "--device", "cuda"
    )
    assert code == 1
    [line] = error_lines(log)
    assert "head_dim" in line and "96" in line and "64 and 128" in line


def test_float32_is_refused_by_name() -> None:
    code, log = run_to_the_end("--device", "cuda", "--dtype", "float32")
    assert code == 1
    [line] = error_lines(log)
    assert "--dtype float32" in line


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer only."""
    folder = tmp_path_factory.mktemp("llama")
    make_model(folder, "llama-3.1-8b", {}, has_weights=False)
    return folder


def test_a_context_that_does_not_fit_is_refused_with_the_ledger(llama_8b: Path) -> None:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    # Room for the weights (16.1 GB) and a small part of the 17 GB of KV of a whole context.
    part = (16.1e9 + 6e9 + total_bytes - free_bytes) / total_bytes
    if part > 0.95:
        pytest.skip("the card is too small for 8B weights")
    code, log = run_to_the_end(
        "--model", str(llama_8b), "--load-format", "dummy", "--device", "cuda",
        "--gpu-memory-utilization", f"{part:.3f}", "--max-model-len", "131072",
    )  # fmt: skip
    assert code == 1
    assert "--max-model-len" in log and "weights" in log and "MiB" in log


HOLD = """
import sys, torch
free, total = torch.cuda.mem_get_info()
held = torch.empty(int(float(sys.argv[1]) * total) - (total - free), dtype=torch.uint8, device=0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def full_card() -> Iterator[None]:
    """Another process takes the card's memory up to 80 %."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, "0.8"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


def test_a_card_that_others_use(full_card: None, llama_8b: Path) -> None:
    free_before, total = torch.cuda.mem_get_info()
    with server_on_card("--device", "cuda") as server:
        assert "Paris" in text_of(chat(server, "What is the capital of France?"))
        free, _ = torch.cuda.mem_get_info()
        assert total - free <= 0.905 * total, "more is taken than --gpu-memory-utilization says"
        assert free < free_before
    weights = 16.1e9
    if 0.9 * total - (total - free_before) > weights:
        pytest.skip("what is left of this card holds 8B weights")
    code, log = run_to_the_end(
        "--model", str(llama_8b), "--load-format", "dummy", "--device", "cuda"
    )
    assert code == 1
    assert "weights" in log and "MiB" in log


class HealthWatch:
    """When /health stopped saying 200, on the clock of time.monotonic."""

    def __init__(self, server: ServerProcess) -> None:
        self.failed_at: float | None = None
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set() and self.failed_at is None:
            if health(self._server) != 200:
                self.failed_at = time.monotonic()
            time.sleep(0.01)


# Last, and the hang last of all: what they do to the card must not be seen by other tests.
@pytest.mark.parametrize(
    ("fault", "within_s", "words"),
    [
        ("assert", 1.0, ASSERT),
        ("index", 1.0, ASSERT),
        ("hang", DEADLINE_S + 1.0, ("hangs",)),
    ],
)
def test_a_lost_gpu_ends_streams_and_the_process(
    fault: str, within_s: float, words: tuple[str, ...], tmp_path: Path
) -> None:
    trigger = tmp_path / "strike"
    command = (sys.executable, "-m", "tests.gpu.broken_server", fault, str(trigger))
    body = {"prompt": "Hello", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    with server_on_card(*SMALL, command=command) as server:
        whole = post(server, "/v1/completions", **{**body, "max_tokens": 400}, cache_salt="a")
        expected = whole["choices"][0]["text"]
        text, errors, struck_at = "", [], 0.0
        with HealthWatch(server) as watch:
            for frame in stream(server, "/v1/completions", **body, cache_salt="b"):
                if "error" in frame:
                    errors.append(frame["error"])
                    continue
                assert not errors, "a token after the error"
                text += frame["choices"][0]["text"]
                if not struck_at and len(text) > 20:
                    trigger.touch()
                    struck_at = time.monotonic()
            assert len(errors) == 1 and errors[0]["message"]
            code = server.process.wait(within_s + EXIT_TIMEOUT_S)
        log = server.log.read_text()
    assert code not in (0, None)
    assert watch.failed_at is not None and watch.failed_at - struck_at < within_s + 0.2
    # Every token that came was a right one.
    length = min(len(text), len(expected))
    assert length > 20 and text[:length] == expected[:length]
    lines = error_lines(log)
    assert lines and any(word in lines[-1] for word in words), log[-2000:]
    assert "Traceback" not in log, log[-3000:]
