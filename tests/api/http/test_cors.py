"""Cross-origin requests: who may, what a preflight says, streams and errors included."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.fakes import MODEL, Server, run_server

PAGE = "https://chat.example"
ALLOW = "Access-Control-Allow-"
ASK = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
ASK_HEADERS = {**ASK, "Access-Control-Request-Headers": "authorization, content-type"}


@pytest.fixture(scope="module")
def guarded(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(
        tokenizer_folder,
        api_keys=("k",),
        allowed_origins=(PAGE, "http://localhost:3000"),
        allowed_methods=("POST",),
        allowed_headers=("Authorization",),
        allow_credentials=True,
        root_path="/llm",
    ) as running:
        running.play("Hello")
        yield running


def test_any_page_may_by_default(server: Server) -> None:
    status, headers, body = server.request("OPTIONS", "/v1/chat/completions", headers=ASK_HEADERS)
    assert (status, body) == (204, b"")
    assert headers[f"{ALLOW}Origin"] == "*"
    assert headers[f"{ALLOW}Methods"] == "GET, HEAD, POST"
    assert headers[f"{ALLOW}Headers"] == "authorization, content-type"
    assert headers["Access-Control-Max-Age"] == "600" and len(headers["X-Request-Id"]) == 32
    assert f"{ALLOW}Credentials" not in headers


def test_answers_streams_and_errors_carry_the_permission(server: Server) -> None:
    body = {"model": MODEL, "prompt": "Hello"}
    for path, sent, status in (
        ("/v1/completions", body, 200),
        ("/v1/completions", {**body, "stream": True}, 200),
        ("/v1/completions", {**body, "max_tokens": -1}, 400),
        ("/nowhere", body, 404),
    ):
        got, headers, _ = server.request("POST", path, sent, headers={"Origin": PAGE})
        assert (got, headers[f"{ALLOW}Origin"]) == (status, "*")
        assert "Retry-After" in headers["Access-Control-Expose-Headers"]


def test_requests_of_no_page_get_no_such_headers(server: Server) -> None:
    _, headers, _ = server.request("GET", "/v1/models")
    assert not [name for name in headers if name.startswith("Access-Control")]
    # Not a preflight: the verb is not allowed, as before.
    assert server.request("OPTIONS", "/v1/models")[0] == 405


def test_named_origins(guarded: Server) -> None:
    status, headers, _ = guarded.request("OPTIONS", "/llm/v1/completions", headers=ASK_HEADERS)
    assert status == 204  # without a key: browsers send none
    assert headers[f"{ALLOW}Origin"] == PAGE and headers["Vary"] == "Origin"
    assert (headers[f"{ALLOW}Methods"], headers[f"{ALLOW}Headers"]) == ("POST", "Authorization")
    assert headers[f"{ALLOW}Credentials"] == "true"
    # A page must be able to read why it was refused.
    status, headers, _ = guarded.request("GET", "/v1/models", headers={"Origin": PAGE})
    assert (status, headers[f"{ALLOW}Origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", f"{PAGE}.evil", "null", "*", "http://localhost"]
)
def test_other_origins_get_no_permission(guarded: Server, origin: str) -> None:
    for method, extra in (("OPTIONS", ASK), ("GET", {"Authorization": "Bearer k"})):
        _, headers, _ = guarded.request(method, "/v1/models", headers={**extra, "Origin": origin})
        assert not [name for name in headers if name.startswith("Access-Control")]
        assert headers["Vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", ""])
def test_a_page_of_another_origin_must_name_json_so_that_its_browser_asks_first(
    guarded: Server, origin: str
) -> None:
    def post(**headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=20)
        try:
            body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 1})
            headers["Authorization"] = "Bearer k"
            connection.request("POST", "/v1/completions", body, headers)
            return connection.getresponse().status
        finally:
            connection.close()

    assert post(Origin=origin) == 400
    assert post(**{"Origin": origin, "Content-Type": "text/plain"}) == 400
    assert post(**{"Origin": origin, "Content-Type": "application/json"}) == 200
    # Who is no page, or one of ours, need not.
    assert post() == 200
    assert post(Origin=f"http://127.0.0.1:{guarded.port}") == 200
