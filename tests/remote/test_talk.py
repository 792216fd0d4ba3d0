"""chat and complete against a scripted server: what is written, kept, counted and refused."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench.server_process import free_port
from bench.stub import MODEL, Stub, StubConfig, running_stub
from pyserve.cli import main
from tests.waiting import wait_until


@pytest.fixture
def stub() -> Iterator[tuple[str, Stub]]:
    with running_stub(StubConfig(delay_s=0.002)) as running:
        yield running


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_until_the_end_of_the_input(
    stub: tuple[str, Stub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, server = stub
    say(monkeypatch, "one", "", "two")
    flags = ["--url", f"{url}/v1", "--system-prompt", "be brief", "--max_tokens", "4", "--stats"]
    assert main(["chat", *flags]) == 0
    first, second = server.seen[-2:]
    assert first["model"] == MODEL and first["max_tokens"] == 4 and first["stream"] is True
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    out, err = capsys.readouterr()
    assert second["messages"][2]["content"] in out and out.count("> ") == 4
    assert f"Using model: {MODEL}" in err and "TTFT: " in err and "TPS: " in err


def test_one_prompt_and_its_answer_alone(
    stub: tuple[str, Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    url, server = stub
    assert main(["complete", "--url", url, "-q", "Once", "--max-tokens", "3"]) == 0
    body: dict[str, Any] = server.seen[-1]
    assert (body["prompt"], body["max_tokens"]) == ("Once", 3)
    out, _ = capsys.readouterr()
    assert out.endswith("\n") and len(out) > 3 and "> " not in out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--url", "ftp://x"], 2, "--url must be such as http://localhost:8000/v1, got ftp://x"),
        (["--nothing"], 2, "unknown flag --nothing"),
        (["--api-key", "a\nb"], 2, "--api-key holds a character"),
        (["--url", "http://127.0.0.1:{}"], 1, "no server answers at http://127.0.0.1:"),
    ],
)
def test_what_cannot_be_asked(
    argv: list[str], code: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    argv = [word.format(free_port()) for word in argv]
    assert main(["chat", *argv]) == code
    assert words in caplog.text


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_text_that_is_no_utf8(
    stub: tuple[str, Stub], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    url, _ = stub
    assert main([command, "--url", url, "-q", os.fsdecode(b"\xff")]) == 1
    assert "error: the text is not valid UTF-8" in capsys.readouterr().err


def test_an_error_of_the_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with running_stub(StubConfig(fail_every=1)) as (url, _):
        assert main(["complete", "--url", url, "--quick", "x"]) == 1
    assert "error: HTTP 500: stub failure" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_not_the_talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with running_stub(StubConfig(delay_s=0.01)) as (url, server):
        said: list[str] = []

        def interrupt() -> None:
            def is_talking() -> bool:
                said.append(capsys.readouterr().out)
                return bool(server.seen) and len("".join(said)) > 10

            wait_until(is_talking)
            os.kill(os.getpid(), signal.SIGINT)

        say(monkeypatch, "a long one")
        thread = threading.Thread(target=interrupt)
        thread.start()
        began_s = time.monotonic()
        assert main(["chat", "--url", url, "--max-tokens", "5000"]) == 0
        thread.join(30)
    assert time.monotonic() - began_s < 40, "all of it takes 50 s and more"
    assert signal.getsignal(signal.SIGINT) is before
