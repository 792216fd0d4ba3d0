"""A share of the clients is hostile; what is left of them afterwards, and bad answers, are told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bench import fuzz, hostile_soak
from bench.answers import Answer
from bench.hostile import Case
from bench.hostile_soak import main
from bench.stub import StubConfig, running_stub
from pyserve.http_client import Endpoint


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SETTLE_S", 0.0)


def run_on(config: StubConfig, *flags: str) -> int:
    with running_stub(config) as (url, _):
        return main(["--url", url, "-n", "60", "-c", "5", "--max-growth-mib", "200", *flags])


def test_a_share_of_the_slots_is_hostile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile_soak, "FAMILIES", ("silent", "abort"))
    out = tmp_path / "out.json"
    assert run_on(StubConfig(delay_s=0.002), "--json", str(out)) == 0
    record = json.loads(out.read_text())
    assert record["result"]["num_complete"] + record["result"]["num_aborted"] == 60
    assert set(record["hostile"]) == {"silent", "abort"} and record["config"]["concurrency"] == "4"
    assert "hostile requests of 1 clients" in capsys.readouterr().out


def test_a_bad_answer_to_a_hostile_client_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def two_more(pid: int | None, at_most: int | None) -> int:
        return 7

    async def no_answer(endpoint: Endpoint, case: Case) -> tuple[list[Answer], str | None, bytes]:
        await asyncio.sleep(0.001)
        return [], "no answer at all", b""

    monkeypatch.setattr(hostile_soak, "run_case", no_answer)
    monkeypatch.setattr(hostile_soak, "FAMILIES", ("field",))
    monkeypatch.setattr(hostile_soak, "count_files", lambda pid: 5)
    monkeypatch.setattr(hostile_soak, "wait_files", two_more)
    assert run_on(StubConfig()) == 1
    output = capsys.readouterr().out
    assert "FAILED 2 open files more" in output
    assert "hostile requests: field" in output and "no answer at all" in output


@pytest.mark.parametrize("flags", [["-c", "1"], ["--hostile-share", "1"], ["--streams", "4"]])
def test_flags_that_make_no_sense(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
