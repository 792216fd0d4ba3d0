"""The real route table, walked without a key, with wrong ones and with the right one."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import socket
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from pyserve.api import app
from pyserve.api.app import ROUTES, build_app
from pyserve.api.http.keys import Keys
from tests.api.fakes import MODEL, Server, exchange, run_server
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
ROOT_PATH = "/llm"
# Written out: a new public route has to be put here too.
PUBLIC = {
    "/health", "/health/live", "/health/ready", "/ping",
    "/", "/docs", "/openapi.json", "/static/{name}",
}  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
WRONG = ("", "secret", "Bearer", "Bearer ", "Bearer nope", "Basic secret", "Bearer secre",
         "Bearer secret2", "Bearer secret,other", "Bearer SECRET")  # fmt: skip
RIGHT = ("Bearer secret", "bearer secret", "BEARER  secret ", "Bearer other")
# The other header holds the key alone; both headers of a request: one right key is enough.
WRONG_HEADERS: tuple[dict[str, str], ...] = (
    {},
    *({"Authorization": value} for value in WRONG),
    *({"X-Api-Key": value} for value in ("", " ", "nope", "secre", "secret2", "SECRET",
      "Bearer secret", "bearer secret", "secret,other", "secret other", "Bearer", "\xff")),
    {"Authorization": "Bearer nope", "X-Api-Key": "nope"},
    {"Authorization": "secret", "X-Api-Key": "Bearer secret"},
    {"Authorization": "Basic secret", "X-Api-Key": ""},
    {"Api-Key": "secret"}, {"X-Api-Keys": "secret"}, {"Proxy-Authorization": "Bearer secret"},
    {"Cookie": "x-api-key=secret"},
)  # fmt: skip
RIGHT_HEADERS: tuple[dict[str, str], ...] = (
    *({"Authorization": value} for value in RIGHT),
    *({name: value} for name in ("x-api-key", "X-Api-Key", "X-API-KEY")
      for value in ("secret", "other", " secret ")),
    {"Authorization": "Bearer nope", "X-Api-Key": "secret"},
    {"Authorization": "Bearer secret", "X-Api-Key": "nope"},
    {"Authorization": "Basic dXNlcjpwYXNz", "X-Api-Key": "other"},
)  # fmt: skip


@pytest.fixture(scope="module", params=["", ROOT_PATH], ids=["plain", "root path"])
def guarded(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(
        tokenizer_folder, api_keys=("secret", "other"), root_path=request.param
    ) as server:
        yield server


@pytest.fixture
def connection(guarded: Server) -> Iterator[HTTPConnection]:
    """One for the thousands of requests of a walk."""
    with closing(guarded.connection()) as opened:
        yield opened


def table(server: Server) -> list[tuple[str, str]]:
    """(method, path) of every route aiohttp really has."""
    found = []
    for route in build_app(server.state).router.routes():
        assert route.resource is not None
        found.append((route.method, route.resource.canonical))
    return found


def is_public(server: Server, path: str) -> bool:
    root_path = server.state.config.root_path
    plain = path.removeprefix(root_path).rstrip("/") or "/"
    return plain in PUBLIC


def fill(path: str) -> str:
    return path.replace("{model}", MODEL).replace("{name}", "page.css")


def test_the_table_is_whole(guarded: Server) -> None:
    paths = {path for _, path in table(guarded)}
    assert paths >= {re.sub(r":[^}]*", "", route.path) for route in ROUTES}
    assert paths >= PUBLIC | {CHAT, "/load", "/metrics", "/v1/models/{model}"}
    if guarded.state.config.root_path:
        spelled_once = {path.rstrip("/") for path in paths}
        assert len(spelled_once) == 2 * len({route.path for route in ROUTES})


def test_every_route_but_the_public_ones_needs_the_key(
    guarded: Server, connection: HTTPConnection
) -> None:
    num_guarded = 0
    ask = partial(exchange, connection)
    for method, path in table(guarded):
        url = fill(path)
        if is_public(guarded, path):
            assert ask(method, url)[0] in (200, 308), url
            continue
        num_guarded += 1
        for headers in WRONG_HEADERS:
            status, reply_headers, body = ask(method, url, headers=headers)
            assert (status, reply_headers["WWW-Authenticate"]) == (401, "Bearer"), (url, headers)
            if method != "HEAD":
                kind = json.loads(body)["error"]["type"]
                assert kind in ("AuthenticationError", "authentication_error")
        for headers in RIGHT_HEADERS:
            status = ask(method, url, headers=headers)[0]
            # There is nothing of these ids, and no adapter without --enable-lora.
            is_nothing = "_id}" in path or "load_lora_adapter" in path
            assert status != 401 and (status == 404) == is_nothing, url
    assert num_guarded >= 9
    assert guarded.engine.submitted == []


def test_every_verb_on_every_path_needs_the_key(
    guarded: Server, connection: HTTPConnection
) -> None:
    known = set(table(guarded))
    for path in sorted({path for _, path in known}):
        for method in METHODS:
            status, _, body = exchange(connection, method, fill(path))
            if (method, path) in known and is_public(guarded, path):
                assert status in (200, 308)
            else:
                assert status == 401, (method, path, body)


def test_every_path_is_the_same_with_a_slash_at_its_end(guarded: Server) -> None:
    """And without one; a page is sent to where its relative links lead to its files."""
    root_path = guarded.state.config.root_path
    headers = {"Authorization": "Bearer secret"}
    for route in ROUTES:
        if "{name" in route.path:
            continue
        for prefix in {"", root_path}:
            url = prefix + fill(re.sub(r":[^}]*", "", route.path))
            other = url[:-1] if url.endswith("/") else url + "/"
            replies = [guarded.request(route.method, path, headers=headers)
                       for path in (url, other or "/")]  # fmt: skip
            if route.path in ("/", "/docs") and url != "/":
                assert [reply[0] for reply in replies] == [200, 308]
                assert urllib.parse.urljoin(other, replies[1][1]["Location"]) == url
            else:
                assert replies[0][0] == replies[1][0], url
                is_nothing = "_id}" in route.path or "load_lora_adapter" in route.path
                assert (replies[0][0] == 404) == is_nothing, url
                assert replies[0][1]["Content-Type"] == replies[1][1]["Content-Type"]


def test_the_same_for_a_key_s_length_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every known key is compared with both headers, whatever the first comparison says."""
    num_compared: list[int] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        num_compared.append(len(a))
        return compare(a, b)

    monkeypatch.setattr("hmac.compare_digest", counting)
    keys = Keys((("alice", "secret"), ("bob", "other")))
    for headers in (*WRONG_HEADERS, *RIGHT_HEADERS):
        num_compared.clear()
        sent = {name: value.strip() for name, value in headers.items()}
        keys.user(make_mocked_request("GET", "/", headers=sent))
        assert num_compared == [32] * 4, headers


def test_no_spelling_of_a_path_gets_around_the_key(
    guarded: Server, connection: HTTPConnection
) -> None:
    for method, path in table(guarded):
        if is_public(guarded, path):
            continue
        url = fill(path)
        encoded = "".join(f"%{ord(char):02x}" for char in url[1:])
        for spelling in (
            url + "/", url + "//", "/" + url, url.replace("/", "//"), url + "?", url + "?x=/health",
            url + "#/health", url + ";/health", url + "%00", url + "%20", url + ".", url.upper(),
            "/" + encoded, "/%2f" + url[1:], "/." + url, "/health/.." + url, "/health/%2e%2e" + url,
            "/health/..;" + url, "/static/.." + url, "/static/..%2f" + url[1:], "/docs" + url,
            "/ping" + url, "/health" + url, "//health" + url, "http://x" + url, "/.." + url,
            ROOT_PATH + url, ROOT_PATH + ROOT_PATH + url, url.replace("v1", "V1"),
        ):  # fmt: skip
            status = exchange(connection, method, spelling)[0]
            assert status in (400, 401), (method, spelling)
    assert guarded.engine.submitted == []


def test_a_public_route_makes_no_other_verb_of_its_path_public(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "ROUTES", (*ROUTES, app.Route("POST", "/docs", app.version)))
    with run_server(tokenizer_folder, api_keys=("secret",)) as server:
        assert server.request("GET", "/docs")[0] == 200
        assert server.request("POST", "/docs")[0] == 401
        right = {"Authorization": "Bearer secret"}
        assert server.request("POST", "/docs", headers=right)[0] == 200


def test_the_whole_of_a_key_is_compared(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the digests of two keys differ in their last byte alone."""

    class Digest:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def digest(self) -> bytes:
            return bytes(31) + self.data[-1:]

    monkeypatch.setattr(hashlib, "sha256", Digest)
    with run_server(tokenizer_folder, api_keys=("secret",)) as server:
        for key, status in (("secret", 200), ("secreu", 401), ("secre", 401), ("secrets", 401)):
            for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert server.request("GET", "/version", headers=headers)[0] == status, headers


def test_no_spelling_reads_another_file(guarded: Server) -> None:
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "..", ".", "app.py", "page.html",
                 "....//app.py", "%2fetc%2fpasswd", "page.css%00", "page.css/"):  # fmt: skip
        status, _, body = guarded.request("GET", "/static/" + name)
        assert status == 401 and b"import" not in body, name


def test_load_counts_what_is_in_flight(server: Server) -> None:
    assert json.loads(server.request("GET", "/load")[2]) == {"server_load": 0}
    server.play("Hello", eos=False, delay_s=0.05)
    with server.connect(CHAT, {"messages": MESSAGES, "max_tokens": 100, "stream": True}) as sock:
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert json.loads(server.request("GET", "/load")[2]) == {"server_load": 1}


def test_the_prefix_cache_is_reset_with_the_key_and_not_by_a_page(guarded: Server) -> None:
    path = guarded.state.config.root_path + "/reset_prefix_cache"
    num_before = guarded.engine.num_resets
    assert guarded.request("POST", path)[0] == 401
    key = {"Authorization": "Bearer secret"}
    status, _, body = guarded.request("POST", path, headers={**key, "Origin": "http://other"})
    assert (status, guarded.engine.num_resets) == (400, num_before) and b"another host" in body
    status, _, body = guarded.request("POST", path, headers=key)
    assert (status, json.loads(body)) == (200, {"success": True})
    assert guarded.engine.num_resets == num_before + 1
    guarded.state.status = "draining"
    assert guarded.request("POST", path, headers=key)[0] == 503
    guarded.state.status = "ready"


def test_it_sleeps_for_who_asks_with_the_key(guarded: Server) -> None:
    root_path, key = guarded.state.config.root_path, {"Authorization": "Bearer secret"}

    def ask(method: str, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, body = guarded.request(method, root_path + path, headers=key | headers)
        return status, json.loads(body)

    assert ask("GET", "/is_sleeping") == (200, {"is_sleeping": False})
    for path, param in (
        ("/sleep?level=0", "level"), ("/sleep?level=x", "level"), ("/sleep?mode=wait", "mode"),
        ("/wake_up?tags=weights", "tags"),
    ):  # fmt: skip
        status, answer = ask("POST", path)
        assert (status, answer["error"]["param"]) == (400, param)
    assert ask("POST", "/sleep", Origin="http://other")[0] == 400
    assert guarded.request("POST", f"{root_path}/sleep")[0] == 401
    assert ask("GET", "/is_sleeping")[1] == {"is_sleeping": False}
    assert ask("POST", "/sleep?level=2&mode=abort") == (200, {"status": "sleeping", "level": 2})
    assert ask("GET", "/is_sleeping")[1] == {"is_sleeping": True}
    assert guarded.request("GET", f"{root_path}/health")[0] == 200
    state = guarded.request("GET", f"{root_path}/metrics", headers=key)[2].decode()
    assert re.search(r'vllm:engine_sleep_state{.*sleep_state="discard_all"} 1', state)
    assert ask("POST", "/wake_up?tags=weights&tags=kv_cache") == (
        200, {"status": "awake", "tags": ["weights", "kv_cache"]},
    )  # fmt: skip
    assert ask("POST", "/sleep") == (200, {"status": "sleeping", "level": 1})
    assert ask("POST", "/wake_up") == (200, {"status": "awake", "tags": None})


def test_requests_are_aborted_by_id_or_all(server: Server) -> None:
    """Also one whose client reads nothing: nothing of it runs on."""
    path, completions = "/abort_requests", "/v1/completions"
    server.play("Hello", starts=False)
    streams = {"chat": CHAT, "completion": completions, "message": "/v1/messages",
               "response": "/v1/responses"}  # fmt: skip
    body = {"messages": MESSAGES, "input": "hi", "prompt": "hi", "max_tokens": 50}
    fields = {CHAT: ("messages", "max_tokens"), completions: ("prompt", "max_tokens"),
              "/v1/messages": ("messages", "max_tokens"), "/v1/responses": ("input",)}  # fmt: skip

    def ask(id: str) -> tuple[int, str]:
        sent = {name: body[name] for name in fields[streams[id]]}
        sent |= {"model": MODEL, "stream": id != "completion"}
        status, _, reply = server.request("POST", streams[id], sent, {"X-Request-Id": id})
        return status, reply.decode()

    def abort(body: object) -> object:
        status, _, reply = server.request("POST", path, body)
        assert status == 200, reply
        return json.loads(reply)

    with ThreadPoolExecutor() as pool:
        answers = {id: pool.submit(ask, id) for id in streams}
        wait_until(lambda: len(server.state.generations) == 4)
        wait_until(lambda: len(server.engine.running()) == 4)
        assert abort({"request_ids": ["chatcmpl-nobody", "hat"]}) == {
            "status": "aborted", "aborted": 0,
        }  # fmt: skip
        assert abort({"request_ids": ["chatcmpl-chat", "message"]}) == {
            "status": "aborted", "aborted": 2,
        }  # fmt: skip
        assert len(server.engine.running()) == 2
        for id, words in (("chat", "data: [DONE]"), ("message", "event: error")):
            status, text = answers[id].result(30)
            assert status == 200 and "operator" in text and words in text
        wait_until(lambda: len(server.state.generations) == 2)
        assert abort({"request_ids": ["response"]}) == {"status": "aborted", "aborted": 1}
        assert abort(None) == {"status": "aborted", "aborted": 1}
        assert server.engine.running() == []
        status, text = answers["completion"].result(30)
        assert status == 499 and json.loads(text)["error"]["type"] == "AbortedError"
        status, text = answers["response"].result(30)
        assert "event: response.failed" in text and "operator" in text
    wait_until(lambda: not server.state.generations)
    assert abort({"request_ids": []}) == {"status": "aborted", "aborted": 0}
    for wrong in ({"request_ids": "chat"}, {"request_ids": [1]}):
        assert server.error(path, wrong)["param"].startswith("request_ids")
    assert server.request("POST", path, headers={"Origin": "http://other"})[0] == 400


def test_a_request_keeps_its_id(guarded: Server) -> None:
    given = "trace-1:a/b=c+d.e_f@g"
    server_headers = {"X-Request-Id": given, "Authorization": "Bearer secret"}
    for method, path, status in (
        ("GET", "/health", 200), ("GET", "/", 200), ("GET", "/version", 200),
        ("HEAD", "/docs", 200), ("GET", "/nothing", 404), ("PUT", "/version", 405),
        ("POST", CHAT, 400),
    ):  # fmt: skip
        got, headers, _ = guarded.request(method, path, headers=server_headers)
        assert (got, headers["X-Request-Id"]) == (status, given), path
    preflight = {"Origin": "http://x", "Access-Control-Request-Method": "POST"}
    status, headers, _ = guarded.request("OPTIONS", CHAT, headers={**server_headers, **preflight})
    assert (status, headers["X-Request-Id"]) == (204, given)
    status, headers, _ = guarded.request("GET", "/version", headers={"X-Request-Id": given})
    assert (status, headers["X-Request-Id"]) == (401, given)


def test_the_id_is_in_the_answer(server: Server) -> None:
    for stream in (False, True):
        server.play("Hello")
        body: dict[str, Any] = {"messages": MESSAGES, "stream": stream}
        status, headers, reply = server.request("POST", CHAT, body, {"X-Request-Id": "mine"})
        assert (status, headers["X-Request-Id"]) == (200, "mine")
        assert b'"id":"chatcmpl-mine"' in reply
    server.play("Hello")
    body = {"messages": MESSAGES, "request_id": "named"}
    _, headers, reply = server.request("POST", CHAT, body, {"X-Request-Id": "mine"})
    assert headers["X-Request-Id"] == "mine" and b'"id":"chatcmpl-named"' in reply


@pytest.mark.parametrize(
    "given", ["", "a" * 129, "a b", 'a"b', "<x>", "é", "a\tb", "%0d%0a", "a,b"]
)
def test_an_unsafe_id_is_replaced(server: Server, given: str) -> None:
    headers = {"X-Request-Id": given}
    made = [server.request("GET", "/health", headers=headers)[1]["X-Request-Id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made) and made[0] != made[1]


def test_broken_http_has_an_id_too(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: first\r\n\r\n")
        first = sock.recv(65536)
        sock.sendall(b"GET / HTTP/9.9\r\n\r\n")
        second = sock.recv(65536)
    assert b"X-Request-Id: first\r\n" in first
    assert re.search(rb"X-Request-Id: [0-9a-f]{32}\r\n", second)


def test_a_failure_is_logged_with_the_id(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str | None) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(type(server.state), "check_model_name", lambda self, name: fail(name))
    status, headers, body = server.request(
        "POST", CHAT, {"messages": MESSAGES}, {"X-Request-Id": "find-me"}
    )
    assert (status, headers["X-Request-Id"]) == (500, "find-me")
    assert b"boom" not in body
    assert "request find-me failed unexpectedly" in caplog.text
