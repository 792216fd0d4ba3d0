"""The benchmark of what the API costs: it measures every kind it names."""

from __future__ import annotations

import json
import re

import pytest

from bench import host_cost


def test_both_tables_are_filled(capsys: pytest.CaptureFixture[str]) -> None:
    assert host_cost.main(["--runs", "1", "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    kinds = ("put and read", "with a stop string", "with its chat frame", "with its completion")
    for name in (*kinds, *(name for name, _, _ in host_cost.BODIES)):
        found = re.search(rf"^{name} .* (\d+\.\d+)\b", printed, re.MULTILINE)
        assert found is not None and float(found[1]) > 0.0, name


def test_bodies_are_what_they_say() -> None:
    decoded = {
        name: wire.decode(json.dumps(value).encode(), max_list_ids=2**17)
        for name, wire, value in host_cost.BODIES
    }
    assert [name for name, (_, ignored) in decoded.items() if ignored] == [
        "an unknown field in each"
    ]
