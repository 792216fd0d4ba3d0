"""A 404 teaches: method, path, the nearest route; a log line for each path, not each request."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from aiohttp import web
from yarl import URL

from pyserve import __version__
from pyserve.api.app import ROUTES
from pyserve.api.pages.unknown_paths import (
    ELSEWHERE,
    MAX_BURST_LINES,
    MAX_KNOWN_PATHS,
    UnknownPaths,
)
from pyserve.features import PATHS
from tests.api.fakes import Server, run_server

CHAT = "/v1/chat/completions"
KNOWN = [(route.method, route.path) for route in ROUTES if "{" not in route.path]


@pytest.fixture
def fresh(tokenizer_folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Server]:
    caplog.set_level("INFO", logger="pyserve")
    with run_server(tokenizer_folder) as server:
        yield server


def request(method: str, path: str) -> web.Request:
    """What is looked at of a request."""
    return cast("web.Request", SimpleNamespace(method=method, rel_url=URL(path)))


def message(method: str, path: str, root_path: str = "") -> str:
    return UnknownPaths(KNOWN, root_path=root_path).not_found(request(method, path)).message


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/chat/completions", f"the API is under /v1, use POST {CHAT}"),
        ("GET", "/models", "the API is under /v1, use GET /v1/models"),
        ("GET", "/completions", "the API is under /v1, use POST /v1/completions"),
        ("POST", "/v1/chat/completion", f"use POST {CHAT}"),
        ("POST", "/v1/chat", f"use POST {CHAT}"),
        ("POST", "/V1/Chat/Completions", f"use POST {CHAT}"),
        ("POST", "/v1//chat/completions//", f"use POST {CHAT}"),
        ("POST", "/v1/v1/chat/completions", f"use POST {CHAT}"),
        ("POST", "/api/v1/chat/completions", f"use POST {CHAT}"),
        ("POST", "/openai/deployments/x/chat/completions?api-version=1", f"use POST {CHAT}"),
        ("POST", "/v1/engines/x/completions", "use POST /v1/completions"),
        ("GET", "/v1", "use GET /v1/models"),
        ("POST", "/api/chat", f"use POST {CHAT}"),
        ("GET", "/api/tags", "use GET /v1/models"),
        ("GET", "/healthz", "use GET /health"),
        ("POST", "/v1/tokenize", "use POST /tokenize"),
        ("POST", "/v1/threads", "/v1/threads is not built yet in pyserve " + __version__),
        ("GET", "/v1/threads/thread_1", "/v1/threads is not built yet"),
        ("POST", "/v1/messages/batches?beta=true", "/v1/messages/batches is not built yet"),
        ("POST", "/embeddings", "use POST /v1/embeddings"),
        ("POST", "/pooling", "/pooling is not built yet"),
        ("POST", "/v1/chat/completions/batch", "/v1/chat/completions/batch is not built yet"),
        ("GET", "/wp-admin.php", "the API is under /v1, and /docs shows all of it"),
        ("GET", "/v1/dashboard", "the API is under /v1"),
    ],
)
def test_the_nearest_route(method: str, path: str, hint: str) -> None:
    said = message(method, path)
    assert said.startswith(f"there is no {method} {path.partition('?')[0]} here: ")
    assert hint in said


def test_below_a_root_path() -> None:
    assert message("POST", "/llm/chat/completions", "/llm").endswith(f"use POST /llm{CHAT}")
    assert message("GET", "/llm/nothing", "/llm").endswith("/llm/docs shows all of it")
    assert message("POST", "/chat/completions", "/llm").endswith(f"use POST {CHAT}")
    assert message("POST", "/llmx/chat/completions", "/llm").endswith(f"use POST {CHAT}")


def test_the_tables_hold_what_does_not_exist_and_lead_to_what_does() -> None:
    paths = {path for _, path in KNOWN}
    assert not paths & set(PATHS) and not paths & set(ELSEWHERE)
    assert set(ELSEWHERE.values()) <= paths


@pytest.mark.parametrize(
    "path", ["/%0d%0aX-Injected:%201", "/%00", "/%ff%fe", "/\x7f", "/<script>", "/" + "a" * 5000]
)
def test_a_path_is_shown_short_and_printable(
    fresh: Server, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    for method in ("GET", "POST"):
        status, _, body = fresh.request(method, path.replace("\x7f", "%7f"))
        said = json.loads(body)["error"]["message"]
        assert status == 404 and said.isprintable() and said.isascii() and len(said) < 300
    assert all(line.isprintable() and len(line) < 400 for line in caplog.messages)


def test_it_is_an_error_like_any_other(server: Server) -> None:
    error = server.error("/chat/completions", {"messages": []}, 404)
    assert (error["type"], error["param"]) == ("NotFoundError", None)
    assert error["message"].startswith("there is no POST /chat/completions here: ")
    assert f"//v1/completions here: use POST {CHAT[:4]}completions" in server.error(
        "//v1/completions", {}, 404
    )["message"]  # fmt: skip
    assert server.request("HEAD", "/api/hello")[0] == 404


def test_a_wrong_verb_is_told_the_right_one(server: Server) -> None:
    status, headers, body = server.request("GET", CHAT)
    assert (status, headers["Allow"]) == (405, "POST")
    assert json.loads(body)["error"]["message"] == f"GET is not allowed on {CHAT}: use POST"
    _, _, body = server.request("DELETE", "/ping/")
    assert json.loads(body)["error"]["message"].endswith("/ping/: use GET or HEAD or POST")


def test_one_line_for_each_path(fresh: Server, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        for path in ("/chat/completions", "/v1/threads", "/favicon.ico"):
            fresh.request("POST", path, {"a": "secret"}, {"X-Request-Id": "find-me"})
    fresh.request("GET", "/v1/models")
    assert [line for line in caplog.messages if "there is no" in line] == [
        "request find-me: there is no POST /chat/completions here: "
        f"the API is under /v1, use POST {CHAT}",
        "request find-me: there is no POST /v1/threads here: "
        f"/v1/threads is not built yet in pyserve {__version__}",
    ]


def test_a_scanner_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="pyserve")
    now = time.monotonic()
    monkeypatch.setattr("pyserve.api.generation.request_log.time.monotonic", lambda: now)
    paths = UnknownPaths(KNOWN, root_path="")
    for number in range(3000):
        paths.not_found(request("GET", f"/admin{number}.php"))
    assert len(caplog.messages) == MAX_BURST_LINES
    assert len(paths._logged) == MAX_KNOWN_PATHS
    now += 20.0
    for number in range(10):
        paths.not_found(request("GET", f"/later{number}"))
    assert len(caplog.messages) == MAX_BURST_LINES + 2
    assert "(2980 other unknown paths before it)" in caplog.messages[-2]
    assert "before it" not in caplog.messages[-1]
