"""bench.few_rows_server: what it changes, on a machine without a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import few_rows_server
from pyserve import cli
from pyserve.ops import build


def test_the_server_gets_its_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_native(**kwargs: Any) -> str:
        loaded.append(kwargs)
        return "native"

    def serve(argv: list[str]) -> int:
        load: Any = build.load_native
        assert load(device="cpu") == "native"
        served.append(argv)
        return 3

    loaded: list[dict[str, Any]] = []
    served: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "load_native", load_native)
    monkeypatch.setattr(cli, "main", serve)
    assert few_rows_server.main(["16", "--model", "m"]) == 3
    assert served == [["--model", "m"]] and loaded == [{"device": "cpu"}]
