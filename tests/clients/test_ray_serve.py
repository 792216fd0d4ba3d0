"""Two replicas of the demo model behind one address: bench/ray_serve.py, on this machine's cores.

pip install "ray[serve]" && python -m pytest -m network tests/clients/test_ray_serve.py
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from bench.server_process import free_port
from tests.waiting import wait_until

ray = pytest.importorskip("ray", reason='pip install "ray[serve]"')
pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]
PORT = free_port()
MARK = f"ray-{PORT}"  # names the servers of this run
LEARNT_S = 2.0  # until Ray's proxy has heard where a session was
NUM_SESSIONS = 8


def servers() -> list[int]:
    """Process ids of the replicas' servers, wherever Ray has put them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and folder.joinpath("cmdline").exists():
            words = folder.joinpath("cmdline").read_bytes().split(b"\0")
            if words[1:3] == [b"-m", b"pyserve"] and MARK.encode() in words:
                found.append(int(folder.name))
    return sorted(found)


def client(session: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{PORT}/v1", api_key="x", max_retries=5,
        default_headers={"X-Session-Id": session},
    )  # fmt: skip


def ask(session: str, question: str) -> openai.types.chat.ChatCompletion:
    with client(session) as sdk:
        return sdk.chat.completions.create(
            model="pyserve-demo", messages=[{"role": "user", "content": question}],
            max_tokens=16, temperature=0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from ray import serve

    from bench import ray_serve

    ray.init(include_dashboard=False, num_cpus=4, object_store_memory=200 * 2**20)
    try:
        ray_serve.run(
            ray_serve.parse_args(
                ["--cards", "0", "--cores", "0.5", "--host", "127.0.0.1", "--port", str(PORT)]
                + ["--", "--device", "cpu", "--served-model-name", "pyserve-demo", MARK]
            )
        )
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        wait_until(lambda: not servers(), timeout_s=90)


def test_a_session_stays_where_its_prompts_are(cluster: None) -> None:
    questions = {
        f"s{i}": f"{i}: the capital of France? And of {'Japan' * i}? " * 8
        for i in range(NUM_SESSIONS)
    }
    for session, question in questions.items():
        assert ask(session, question).choices[0].message.content
    time.sleep(LEARNT_S)
    for session, question in questions.items():
        usage = ask(session, question).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached is not None and cached > 0.8 * usage.prompt_tokens, session


def test_streams_and_errors_come_as_they_are(cluster: None) -> None:
    with client("a") as sdk:
        stream = sdk.chat.completions.create(
            model="pyserve-demo", messages=[{"role": "user", "content": "Escribe un poema"}],
            stream=True, temperature=0,
        )  # fmt: skip
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert len(pieces) > 5 and "\n" in "".join(pieces)
        with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
            sdk.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])


def test_a_replica_that_dies_is_replaced(cluster: None) -> None:
    before = servers()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(set(servers()) - set(before)) == 1, timeout_s=90)
    for i in range(6):
        assert "42" in str(ask(f"t{i}", "What is 12 + 30?").choices[0].message.content)
