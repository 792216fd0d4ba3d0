"""Every kind of response is left, and what is still held is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.left_behind import KINDS, main
from tests.api.fakes import make_tokenizer_folder, run_server


def test_responses_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with run_server(make_tokenizer_folder(tmp_path / "tiny"), response_store_bytes=2**16) as server:
        server.play("Hello", eos=False, delay_s=0.001)
        url = f"http://127.0.0.1:{server.port}"
        flags = ["--url", url, "--pid", str(os.getpid()), "--max-growth-mib", "200"]
        assert main([*flags, "-n", "100", "-c", "8", "--json", str(out)]) == 0
        result = json.loads(out.read_text())["result"]
        assert result["num_complete"] + result["num_aborted"] == 100
        assert result["num_complete"] >= 100 * 2 // len(KINDS) and result["num_aborted"] > 20
        assert 0 < result["stored_bytes"] <= 2**16 and result["in_background"] == 0
        assert server.state.responses.num_responses > 0 and not server.engine.running()
        assert main([*flags, "-n", "20", "-c", "2", "--store-mib", "0"]) == 1
    assert "bytes are stored, of 0 MiB" in capsys.readouterr().out
