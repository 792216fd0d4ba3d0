"""Query parameters of every route: wrong ones are refused, unknown ones named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.app import ROUTES
from tests.api.fakes import Server, run_server

IGNORED = "x-pyserve-ignored"


@pytest.fixture(scope="module")
def keeping(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, str]]:
    """A server with files and batches, and the id of a stored response."""
    with run_server(tokenizer_folder, batch_dir=tmp_path_factory.mktemp("batches")) as server:
        server.play("Hello")
        yield server, server.post("/v1/responses", {"input": "hi"})["id"]


@pytest.mark.parametrize(
    ("path", "param", "message"),
    [
        ("GET /v1/files?order=up", "order", "order must be asc or desc, got up"),
        ("GET /v1/batches?order=", "order", "order must be asc or desc, got "),
        ("GET /v1/files?limit=0", "limit", "limit must be in [1, 10000], got 0"),
        ("GET /v1/files?limit=" + "9" * 5000, "limit", "limit must be in [1, 10000], got 9999"),
        ("GET /v1/batches?limit=x", "limit", "limit must be in [1, 10000], got x"),
        ("GET /v1/batches?limit=2.5", "limit", "limit must be in [1, 10000], got 2.5"),
        ("GET /v1/batches?limit=1&limit=2", "limit", "limit must be given once, got 2 values"),
        ("GET /v1/files?after=file-x", "after", "after: nothing has the id file-x"),
        ("GET /v1/batches?after=batch_x", "after", "after: nothing has the id batch_x"),
        ("GET /v1/responses/ID?stream=yes", "stream", "stream must be true or false, got yes"),
        (
            "GET /v1/responses/ID?stream=true&starting_after=-2",
            "starting_after",
            "starting_after must be in [-1, 2147483647], got -2",
        ),
        (
            "GET /v1/responses/ID/input_items?limit=101",
            "limit",
            "limit must be in [1, 100], got 101",
        ),
        ("GET /v1/responses/ID/input_items?order=1", "order", "must be asc or desc, got 1"),
        ("POST /sleep?level=3", "level", "level must be 1 or 2, got 3"),
        ("POST /sleep?mode=wait", "mode", "mode must be abort or keep, got wait"),
        ("POST /wake_up?tags=kv", "tags", "tags must be kv_cache or weights, got kv"),
    ],
)
def test_wrong_values(keeping: tuple[Server, str], path: str, param: str, message: str) -> None:
    server, response_id = keeping
    method, _, url = path.replace("ID", response_id, 1).partition(" ")
    status, _, reply = server.request(method, url)
    error = json.loads(reply)["error"]
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]


def test_right_values(keeping: tuple[Server, str]) -> None:
    server, response_id = keeping
    for path in (
        "/v1/files?order=asc&limit=10000&purpose=batch", "/v1/batches?order=desc&limit=1",
        f"/v1/responses/{response_id}?stream=False", f"/v1/responses/{response_id}?stream=0",
        f"/v1/responses/{response_id}/input_items?order=asc&limit=100",
    ):  # fmt: skip
        status, headers, reply = server.request("GET", path)
        assert (status, headers.get(IGNORED)) == (200, None), reply


def test_unknown_ones_are_named(keeping: tuple[Server, str]) -> None:
    server, response_id = keeping
    answered = 0
    for route in ROUTES:
        path = route.path.replace("{response_id}", response_id)
        if route.method == "GET" and "{" not in path:
            status, headers, _ = server.request("GET", f"{path}?limits=1&b%0A=2")
            assert (status, headers[IGNORED]) == (200, "b?, limits"), path
            answered += 1
    assert answered > 15
    body: dict[str, Any] = {"input": "hi", "mood": 1}
    for more in ({}, {"stream": True}):
        status, headers, _ = server.request("POST", "/v1/responses?beta=true", {**body, **more})
        assert (status, headers[IGNORED]) == (200, "mood, beta")
    assert IGNORED not in server.request("GET", "/v1/files?order=up&limits=1")[1]


def test_starting_after_is_of_a_stream(keeping: tuple[Server, str]) -> None:
    server, response_id = keeping
    status, headers, _ = server.request("GET", f"/v1/responses/{response_id}?starting_after=3")
    assert (status, headers[IGNORED]) == (200, "starting_after")
