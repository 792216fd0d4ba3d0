"""What the benches that try a server share: its place, the verdict, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.trial import Trial, conclude, server_parser, try_server
from pyserve.http_client import Endpoint


def test_a_running_server_is_tried_as_it_is() -> None:
    parser = server_parser("what it does")
    parser.add_argument("--api-key")
    url = "http://localhost:1234"
    args = parser.parse_args(["--url", url, "--pid", "7", "--api-key", "k"])
    seen: list[Trial] = []

    def run(trial: Trial) -> int:
        seen.append(trial)
        return 3

    assert try_server(args, run) == 3
    assert seen == [Trial(Endpoint.parse(url, "k"), 7, None)]


def test_what_cannot_be_tried_is_a_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(trial: Trial) -> int:
        raise RuntimeError(f"no answer from {trial.endpoint.host}")

    args = server_parser(None).parse_args(["--url", "http://h:1"])
    assert try_server(args, fail) == 1
    assert capsys.readouterr().err == "no answer from h\n"


def test_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    parser = server_parser(None)
    parser.add_argument("--api-key")
    args = parser.parse_args(["--json", str(path), "--api-key", "secret", "--url", "u"])
    assert conclude(args, "soak", [], good="fine", more="; 3", result={"a": 1}) == 0
    assert capsys.readouterr().out == "= soak: fine; 3\n"
    record = json.loads(path.read_text())
    assert (record["result"], record["problems"], record["config"]["url"]) == ({"a": 1}, [], "u")
    assert "api_key" not in record["config"]
    assert conclude(args, "soak", ["x", "y"], good="fine", max_shown=1) == 1
    assert capsys.readouterr().out == "FAILED x\n= soak: FAILED\n"
    assert json.loads(path.read_text())["problems"] == ["x", "y"]
