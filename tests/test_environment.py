"""collect-env: what a report of a fault needs, and no secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyserve import __version__
from pyserve.environment import describe_machine, first_line, last_line, version_of


def test_it_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    rows = dict(describe_machine())
    assert rows["pyserve"] == __version__ and rows["torch"] == version_of("torch")
    assert rows["HF_TOKEN"] == "is set" and rows["CUDA_VISIBLE_DEVICES"] == "3"
    assert int(rows["cores"]) >= 1 and rows["memory"].endswith(" GiB")
    assert "hf_secret" not in str(rows)


def test_programs_that_are_not_there_or_fail() -> None:
    assert first_line("no-such-program") is last_line("false") is None
    assert version_of("no-such-package") is None
    assert (first_line("printf", "a\nb"), last_line("printf", "a\nb")) == ("a", "b")


def test_the_command() -> None:
    command = [sys.executable, "-m", "pyserve", "collect-env"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0 and f"pyserve: {__version__}" in done.stdout.splitlines()
