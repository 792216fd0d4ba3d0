"""What a name may have meant while adapters came and went; the bench sees a wrong answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from bench import adapter_churn
from bench.adapter_churn import BASE, Churn, History
from bench.soak import Tally, make_parser
from pyserve.http_client import Endpoint, Reply


def test_versions_of_a_time() -> None:
    history = History()
    history.change("a", 1.0, 2.0)
    history.change("b", 5.0, 6.0)
    history.change(None, 8.0, 9.0)
    assert history.now is None
    assert history.between(0.0, 0.5) == {None}
    assert history.between(0.0, 1.5) == history.between(1.5, 1.8) == {None, "a"}
    assert history.between(2.5, 4.0) == {"a"}
    assert history.between(5.5, 5.6) == {"a", "b"}, "asked for and not answered yet"
    assert history.between(6.5, 7.0) == {"b"}
    assert history.between(0.0, 10.0) == {None, "a", "b"}
    assert history.between(9.5, 10.0) == {None}


def make_churn(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> Churn:
    """Of a server that answers each name as `said`; a name that is missing is a 404."""
    args = make_parser(None).parse_args([])
    churn = Churn(Endpoint("127.0.0.1", 1), Path("/"), args)

    async def ask(self: Churn, name: str, question: str) -> Reply:
        if name not in said:
            return Reply(3.0, status=404, ended_s=3.1, error="HTTP 404")
        return Reply(3.0, status=200, chunk_times=[3.5, 3.6, 4.0], texts={0: said[name]})

    monkeypatch.setattr(adapter_churn.Churn, "_ask", ask)
    churn.answers = {("one-a", "q"): "A", ("one-b", "q"): "B", (BASE, "q"): "base"}
    churn.histories["one"].change("a", 1.0, 2.0)
    return churn


@pytest.mark.parametrize(
    ("said", "name", "problem"),
    [
        ({"one": "A"}, "one", None),
        ({BASE: "base"}, BASE, None),
        ({"one": "B"}, "one", "one (one-a) answers as none of these"),
        ({"one": "base"}, "one", "one (one-a) answers as none of these"),
        ({BASE: "A"}, BASE, f"{BASE} ({BASE}) answers as none of these"),
        ({}, "one", "HTTP 404"),
        ({}, "two", None),
        ({"two": "A"}, "two", "two () answers as none of these"),
    ],
)
def test_answers_are_held_to_their_versions(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], name: str, problem: str | None
) -> None:
    churn, tally = make_churn(monkeypatch, said), Tally()
    asyncio.run(churn._stream(tally, name, "q"))
    assert list(tally.failures) == ([] if problem is None else [problem])
    if name in said and problem is None:
        assert churn.max_gap_s == pytest.approx(0.4) and churn.max_first_s == pytest.approx(0.5)


def test_changes_are_legal_and_known(monkeypatch: pytest.MonkeyPatch) -> None:
    churn = make_churn(monkeypatch, {})
    asked: list[tuple[str, str, object]] = []

    async def post(self: Churn, path: str, body: dict[str, object]) -> None:
        asked.append((path, str(body["lora_name"]), body.get("load_inplace")))

    monkeypatch.setattr(adapter_churn.Churn, "_post", post)
    rng = np.random.default_rng(0)
    is_served = {name: churn.histories[name].now is not None for name in adapter_churn.NAMES}
    for _ in range(200):
        asyncio.run(churn._change(rng))
        path, name, is_reload = asked[-1]
        if path == adapter_churn.LOAD:
            assert is_reload == is_served[name]
        else:
            assert is_served[name]
        is_served[name] = path == adapter_churn.LOAD
        assert (churn.histories[name].now is not None) == is_served[name]
    assert {path for path, *_ in asked} == {adapter_churn.LOAD, adapter_churn.UNLOAD}
    assert {reload for *_, reload in asked} == {True, False, None} and churn.num_changes == 200
