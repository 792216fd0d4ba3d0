"""run-batch as a process: each line once and in order, whatever kills it; exit codes; bad files."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.run_batch import run_batch
from pyserve.config import BatchConfig, ServerConfig
from pyserve.errors import ConfigError
from tests.api.batches.batched import FATAL_TOKEN, load, main
from tests.forked import Forked
from tests.waiting import wait_until

START_S = 60.0


def line(number: int, body: dict[str, Any] | None = None, **fields: Any) -> str:
    body = {"prompt": [80], "max_tokens": 2, **(body or {})}
    return json.dumps(
        {"custom_id": f"r-{number}", "method": "POST", "url": "/v1/completions", "body": body}
        | fields
    )


@pytest.fixture
def log_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run-batch") / "log"


def start(
    folder: Path, source: Path, target: Path, log_path: Path, *, delay_s: float = 0.0
) -> Forked:
    return Forked(main, [*map(str, (folder, source, target, delay_s))], log_path)


def finish(process: Forked, log_path: Path) -> tuple[int | None, str]:
    return process.wait(START_S), log_path.read_text()


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_kept(partial: Path) -> int:
    return partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0


def test_lines_good_and_bad_are_answered_in_their_order(
    tokenizer_folder: Path, tmp_path: Path, log_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        "\ufeff" + line(0),
        "",
        "not json",
        line(2, url="/v1/nothing"),
        line(3, {"stream": True}),
        line(4, {"temperature": 9}),
        line(5, method="GET"),
        json.dumps({"url": "/v1/completions", "body": {}}),
        line(7, custom_id=7),
        "[" * 100_000,
        line(9, {"prompt": "A"}, url="/v1/completions/") + "\r",
        json.dumps({"custom_id": "chat", "url": "/v1/chat/completions", "body": {
            "messages": [{"role": "user", "content": "A"}], "max_tokens": 3}}),
    ]  # fmt: skip
    source.write_bytes(("\n".join(lines) + "\n").encode() + b'{"custom_id": "\xff"}\n' + b"  \n")
    code, log = finish(start(tokenizer_folder, source, target, log_path), log_path)
    assert code == 3, log
    found = answers(target)
    ids = [answer["custom_id"] for answer in found]
    assert ids == ["r-0", None, "r-2", "r-3", "r-4", "r-5", None, None, None, "r-9", "chat", None]
    statuses = [answer["response"]["status_code"] for answer in found]
    assert statuses == [200, *[400] * 8, 200, 200, 400]
    assert found[0]["response"]["body"]["usage"]["completion_tokens"] == 2
    assert found[10]["response"]["body"]["object"] == "chat.completion"
    assert found[0]["error"] is None and found[0]["id"].startswith("batch_req_")
    params = [answer["error"]["param"] for answer in found if answer["error"] is not None]
    assert params == [None, "url", "stream", "temperature", "method", None, None, None, None]
    assert found[4]["error"] == found[4]["response"]["body"]["error"]
    assert all("custom_id" in found[n]["error"]["message"] for n in (6, 7))
    assert f"12 lines in {target}, 9 failed" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def wait_kept(partial: Path, num_lines: int) -> None:
    wait_until(lambda: num_kept(partial) >= num_lines, START_S)


def test_killed_again_and_again_each_line_is_answered_once(
    tokenizer_folder: Path, tmp_path: Path, log_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    source.write_text("".join(line(n, {"max_tokens": 1 + n % 7}) + "\n" for n in range(120)))
    for _ in range(2):
        before = num_kept(partial)
        process = start(tokenizer_folder, source, target, log_path, delay_s=0.03)
        wait_kept(partial, before + 20)
        process.kill()
        finish(process, log_path)
        assert before < num_kept(partial) < 120 and not target.exists()
        with partial.open("ab") as file:
            file.write(b'5\t{"half of a line')  # as the kill may have left it
    first = partial.read_bytes().splitlines()[1]
    code, log = finish(start(tokenizer_folder, source, target, log_path), log_path)
    assert code == 0, log
    assert [answer["custom_id"] for answer in answers(target)] == [f"r-{n}" for n in range(120)]
    assert {answer["response"]["status_code"] for answer in answers(target)} == {200}
    number, _, kept = first.partition(b"\t")
    assert target.read_bytes().splitlines()[int(number)] == kept, "what was kept is not asked again"


def test_a_signal_ends_it_at_once_and_keeps_what_there_is(
    tokenizer_folder: Path, tmp_path: Path, log_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(line(n, {"max_tokens": 1 + 500 * n}) + "\n" for n in range(5)))
    process = start(tokenizer_folder, source, target, log_path, delay_s=0.05)
    wait_kept(tmp_path / "out.jsonl.partial", 1)
    process.send_signal(signal.SIGTERM)
    code, log = finish(process, log_path)
    assert code == 128 + signal.SIGTERM
    assert "1 of 5 lines answered, kept in" in log and "Traceback" not in log


def test_an_engine_that_gives_up_leaves_the_rest_for_the_next_time(
    tokenizer_folder: Path, tmp_path: Path, log_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line(0) + "\n" + line(1, {"prompt": [FATAL_TOKEN]}) + "\n")
    code, log = finish(start(tokenizer_folder, source, target, log_path, delay_s=0.05), log_path)
    assert code == 1 and "boom" in log and "the same command goes on" in log
    assert not target.exists() and "Traceback" not in log


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("missing", "out", "-i {}/missing is not a file"),
        ("in", "no/out", "-o {}/no/out must be a file in a folder that exists"),
        ("in", ".", "must be a file in a folder that exists"),
    ],
)
def test_paths_that_cannot_work(tmp_path: Path, source: str, target: str, words: str) -> None:
    (tmp_path / "in").write_text(line(0))
    batch = BatchConfig(input_file=tmp_path / source, output_file=tmp_path / target)
    with pytest.raises(ConfigError, match=re.escape(words.format(tmp_path))):
        run_batch(batch, ServerConfig(served_model_names=("tiny",)), load)
