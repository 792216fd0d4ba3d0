"""The overload tells those refused from those served, and says what is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.overload import main
from tests.api.fakes import Script, Server, make_tokenizer_folder, run_server

FLAGS = [
    "--seconds", "0.8", "--full-seconds", "0.5", "--warm-up-seconds", "0.1",
    "--max-num-seqs", "4", "--max-queue", "4", "--factor", "4", "--output-len", "8",
    "--max-ratio", "1000", "--max-lag-s", "2", "--max-growth-mib", "500",
    "--pid", str(os.getpid()),
]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with run_server(make_tokenizer_folder(tmp_path / "tiny")) as running:
        running.engine.script = lambda number: Script([80], 0.01)
        running.engine.room = 8
        yield running


def overload(server: Server, *flags: str) -> int:
    return main(["--url", f"http://127.0.0.1:{server.port}", *FLAGS, *flags])


def test_a_sound_server_passes(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert overload(server, "--json", str(out)) == 0, capsys.readouterr().out
    assert "= overload: as it should be" in capsys.readouterr().out
    result = json.loads(out.read_text())["result"]
    assert result["full"]["refusal_s"] == []
    assert set(result["over"]["retry_after_s"]) == {"7"}
    assert len(result["over"]["refusal_s"]) > len(result["over"]["first_token_s"]) > 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-queue", "40"), ["requests refused within the limit"]),
        (("--factor", "0.1"), ["nobody was refused: this was no overload"]),
        (("--input-len", "600"), ["no request was answered"]),
        (
            ("--max-ratio", "0.01", "--max-lag-s", "-1", "--max-growth-mib", "-500"),
            ["p95 of the time to first token", "the event loop was late", "memory grew"],
        ),
    ],
)
def test_what_is_wrong_is_printed(
    server: Server, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: list[str]
) -> None:
    assert overload(server, *flags) == 1
    said = capsys.readouterr()
    failures = re.findall(r"FAILED (.*)", said.out) + [said.err]
    for part in words:
        assert any(part in failure for failure in failures), said
