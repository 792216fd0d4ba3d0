"""What the README says about security names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyserve.api.http import bounds
from pyserve.cli import main
from pyserve.text import grammar, grammar_matcher, grammar_runner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECURITY = README[README.index("## Security") : README.index("## What fits")]
MB = 2**20


def test_every_flag_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]+", SECURITY))
    assert len(named) > 5 and named <= known


def test_every_file_is_there() -> None:
    named = re.findall(r"`((?:api|text|hub|model)/[a-z_/]*(?:\.py)?)`", SECURITY)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / "pyserve" / name).exists()] == []


def test_every_number_is_the_bound_of_the_code() -> None:
    for text in (
        f"{bounds.MAX_CONNECTIONS:,} (TLS {bounds.MAX_TLS_CONNECTIONS:,})",
        f"heads {bounds.MAX_HEAD_BYTES // 1024} KB in {bounds.HEAD_TIMEOUT_S:.0f} s",
        f"each in {bounds.BODY_TIMEOUT_S:.0f} s; {bounds.MAX_UPLOAD_BYTES // MB} MB at once, "
        f"{bounds.MAX_CLIENT_UPLOAD_BYTES // MB} MB of one client",
        f"{bounds.MAX_UNREAD_BYTES // MB} MB at once; {bounds.WRITE_TIMEOUT_S:.0f} s without",
        f"{grammar.MAX_SPEC_BYTES // 1024} KB of text; {grammar_runner.MAX_COMPILE_S:.0f} s of "
        f"work to compile one; {1e3 * grammar_matcher.MAX_TOKEN_S:.0f} ms a token; "
        f"{grammar.MAX_BYTES // MB} MB each, {grammar_matcher.MAX_ALL_BYTES // MB} MB at once",
    ):
        assert text in SECURITY, text
