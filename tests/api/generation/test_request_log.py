"""One line at the end of every request, with its figures and none of its texts."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.generation.request_log import LINES_PER_S, MAX_BURST_LINES, RequestLog
from pyserve.errors import EngineError, InvalidRequestError, QueueFullError
from tests.api.fakes import Script, Server, run_server
from tests.waiting import wait_until

SECRET = "Hello wor"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}


@pytest.fixture(scope="module")
def quiet(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder) as server:
        yield server


@pytest.fixture(scope="module")
def talkative(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder, log_requests=True) as server:
        yield server


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyserve")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [m for m in caplog.messages if m.startswith("request ")]


def wait_line(caplog: pytest.LogCaptureFixture) -> str:
    """The only line; it is written after the client has its answer."""
    wait_until(lambda: lines(caplog))
    time.sleep(0.02)
    (line,) = lines(caplog)
    assert "\n" not in line and SECRET not in line
    return line


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_finished_request(
    quiet: Server, caplog: pytest.LogCaptureFixture, is_streamed: bool
) -> None:
    quiet.play("The lazy dog jumps over", eos=False, delay_s=0.002)
    quiet.engine.num_cached_tokens = 3
    body = {**CHAT, "n": 2, "stream": is_streamed}
    headers = {"X-Request-Id": "mine-1"}
    assert quiet.request("POST", "/v1/chat/completions", body, headers)[0] == 200
    line = wait_line(caplog)
    num_prompt_tokens = len(quiet.engine.submitted[0].prompt)
    assert re.fullmatch(
        rf"request mine-1 /v1/chat/completions finished \(length\): {num_prompt_tokens} prompt "
        r"tokens \(3 cached\), 10 output tokens, queued \d+ ms, first token \d+ ms, "
        r"\d+\.\d tokens/s, \d\.\d\d s",
        line,
    )


def test_a_client_that_hangs_up(quiet: Server, caplog: pytest.LogCaptureFixture) -> None:
    quiet.engine.submitted.clear()
    quiet.engine.script = lambda number: Script([1], starts=False)
    sock = quiet.connect("/v1/completions", {"prompt": SECRET})
    wait_until(lambda: quiet.engine.submitted)
    sock.close()
    line = wait_line(caplog)
    assert re.search(r" aborted \(abort\): \d+ prompt tokens \(0 cached\), 0 output tokens, ", line)
    assert "first token" not in line


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_fails_has_one_line(
    quiet: Server, caplog: pytest.LogCaptureFixture, is_streamed: bool
) -> None:
    quiet.engine.script = lambda number: Script([1], error=EngineError("broken"))
    quiet.request("POST", "/v1/completions", {"prompt": SECRET, "stream": is_streamed})
    assert " failed (error, 500 InternalServerError): " in wait_line(caplog)


def test_a_refused_request_names_only_the_field(
    quiet: Server, caplog: pytest.LogCaptureFixture
) -> None:
    quiet.request("POST", "/v1/completions", {"prompt": SECRET, "temperature": 99})
    line = wait_line(caplog)
    assert re.fullmatch(
        r"request [0-9a-f]{32} /v1/completions refused: 400 BadRequestError, field temperature",
        line,
    )


def test_arrivals_are_logged_on_demand(
    quiet: Server, talkative: Server, caplog: pytest.LogCaptureFixture
) -> None:
    token_ids = talkative.play(SECRET)
    body = {
        "prompt": [SECRET, SECRET], "n": 2, "temperature": 0.5, "stop": ["zzz", "yyy"],
        "logit_bias": {"5": 1.0}, "max_tokens": 9, "seed": 4,
    }  # fmt: skip
    talkative.post("/v1/completions", body)
    wait_until(lambda: len(lines(caplog)) == 2)
    arrival = lines(caplog)[0]
    assert f" arrived: {2 * len(token_ids) - 2} prompt tokens, prompts=2, n=2, " in arrival
    for setting in ("max_tokens=9", "temperature=0.5", "logit_bias=1", "seed=4", "stop=2"):
        assert f", {setting}" in arrival
    assert "zzz" not in arrival and SECRET not in arrival


def test_a_higher_level_silences_them(quiet: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "pyserve")
    quiet.play("Hello")
    quiet.post("/v1/completions", {"prompt": SECRET})
    time.sleep(0.05)
    assert not lines(caplog)


class FakeRequest(dict[Any, Any]):
    path = "/v1/completions"


def test_a_forged_field_name_cannot_break_the_line(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(has_arrivals=False)
    request: Any = FakeRequest()
    log.refused(request, InvalidRequestError("x", "a\nERROR all is lost" + "x" * 200))
    (line,) = lines(caplog)
    assert "\n" not in line and "a?ERROR?all?is?lost" in line and len(line) < 160


def test_a_full_queue_is_summed_up_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    request: Any = FakeRequest()
    RequestLog(has_arrivals=False).refused(request, QueueFullError("full", 1))
    assert not lines(caplog)


def test_a_flood_of_requests_is_no_flood_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(has_arrivals=False)
    request: Any = FakeRequest()
    error = InvalidRequestError("x", "n")
    while log.num_dropped < 30:
        log.refused(request, error)
    assert MAX_BURST_LINES <= len(lines(caplog)) < MAX_BURST_LINES + 100
    num_lines = len(lines(caplog))
    time.sleep(2 / LINES_PER_S)
    log.refused(request, error)
    assert caplog.messages[-2] == "30 lines about requests left out"
    assert len(lines(caplog)) == num_lines + 1
