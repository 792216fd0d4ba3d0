"""bench/gpu_check.sh with an interpreter that plays its parts: faults are named, the rest runs."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "gpu_check.sh"
INTERPRETER = """#!/usr/bin/env bash
seen=$PYSERVE_CHECK_DIR/limits
[[ $* != "-m pytest"* ]] || echo "$(tr '\\0' ' ' </proc/$PPID/cmdline)" >>"$seen"
case "$*" in
  "-c "*load_native*) [ -z "${BROKEN_BUILD:-}" ] || { echo "norm.cu(3): error: what" && exit 1; } ;;
  "-m pytest"*test_norm.py) echo "FAILED tests/gpu/test_norm.py::test_a - assert 1 == 2"
                         echo "1 failed, 3 passed in 0.1s" && exit 1 ;;
  "-m pytest"*test_rope.py) echo "Fatal Python error: Aborted" && exit 134 ;;
  "-m pytest"*) echo "2 passed in 0.1s" ;;
  "-m bench.ops"*) echo "= decode: 85 %" ;;
  "-m bench.full_size"*) echo "= logits" && mkdir -p "$PYSERVE_CHECK_DIR/llama-3.1-8b" ;;
  "-m bench.gpu_serve"*) echo $$ >"$PYSERVE_CHECK_DIR/pid" && exec sleep 60 ;;
esac
"""


def run(tmp_path: Path, *parts: str, **environment: str) -> tuple[int, str]:
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), *parts],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "PYTHON": str(interpreter),
            "OUT": str(tmp_path / "out"),
            "LOGS": str(tmp_path / "logs"),
            "PYSERVE_CHECK_DIR": str(tmp_path / "work"),
            **environment,
        },
    )
    return done.returncode, done.stdout


@pytest.fixture(autouse=True)
def logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()


def test_failed_tests_are_named_and_the_next_part_runs(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "build", "tests", "ops")
    assert code == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert printed.endswith(summary)
    assert "FAILED tests/gpu/test_norm.py::test_a - assert 1 == 2" in summary
    assert "FAILED tests/gpu/test_rope.py: exit code 134: Fatal Python error: Aborted" in summary
    assert "tests     FAILED (1)" in summary and "ops       ok" in summary
    assert summary.count("decode: 85 %") == 3
    num_files = len(list((SCRIPT.parent.parent / "tests" / "gpu").glob("test_*.py"))) - 8
    assert f"tests: {3 + 2 * (num_files - 2)} tests passed in {num_files} files" in summary
    assert len(summary.splitlines()) <= 60
    with tarfile.open(tmp_path / "out" / "logs.tgz") as archive:
        assert "./tests-test_norm.log" in archive.getnames()


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    started = time.monotonic()
    code, printed = run(tmp_path, "serve", "ops", PYSERVE_CHECK_LIMIT_S="3")
    assert code == 2 and time.monotonic() - started < 40
    assert "serve     TIMED OUT" in printed and "ops       NOT RUN" in printed
    pid = (tmp_path / "work" / "pid").read_text().strip()
    assert not Path(f"/proc/{pid}").exists()


def test_nothing_runs_where_the_build_fails(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "build", "ops", BROKEN_BUILD="1")
    assert code == 1
    assert "build     FAILED (1)" in printed and "error: what" in printed
    assert "decode" not in printed


def test_an_unknown_part(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "bild")
    assert code == 64 and "no part bild" in printed


@pytest.mark.parametrize("part, least_s", [("tests", 120), ("ptx80", 240)])
def test_a_test_that_hangs_is_named_before_its_file_is_ended(
    tmp_path: Path, part: str, least_s: int
) -> None:
    run(tmp_path, part)
    lines = (tmp_path / "work" / "limits").read_text().splitlines()
    assert lines
    for line in lines:
        found = re.match(r"timeout -k 5 (\d+) .* --timeout (\d+) ", line)
        assert found is not None, line
        assert least_s <= int(found[2]) < int(found[1]), line


def test_the_lines_that_load_the_ops_are_valid() -> None:
    found = re.search(r"^load='(.*?)'$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1].partition("build.load_native")[0], names)
    with pytest.MonkeyPatch.context() as patch:
        load = create_autospec(names["build"].load_native)
        patch.setattr(names["build"], "load_native", load)
        exec(found[1])
    assert load.call_args.kwargs["device"] == "cuda"
