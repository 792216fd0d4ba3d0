"""The page, the docs and their files: types, caching, and nothing from anywhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyserve.api.pages.site import CONTENT_TYPES, FILES, FOLDER
from tests.api.fakes import Server, run_server

MAX_PAGE_BYTES = 60_000
OURS = ("page.html", "page.css", "page.js", "docs.html", "docs.js")
PATHS = ["/", "/docs", "/openapi.json", *(f"/static/{name}" for name in FILES)]


@pytest.mark.parametrize("path", PATHS)
def test_types_and_caching(server: Server, path: str) -> None:
    status, headers, body = server.request("GET", path)
    assert status == 200 and body
    suffix = ".html" if path in ("/", "/docs") else Path(path).suffix
    assert headers["Content-Type"] == f"{CONTENT_TYPES[suffix]}; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-cache"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';") and "http" not in policy
    got, head, nothing = server.request("HEAD", path)
    assert (got, head["Content-Length"], nothing) == (200, str(len(body)), b"")
    for known in (headers["ETag"], f'"other", W/{headers["ETag"]}', "*"):
        got, again, nothing = server.request("GET", path, headers={"If-None-Match": known})
        assert (got, again["ETag"], nothing) == (304, headers["ETag"], b"")
    for other in ('"other"', "nonsense", '"'):
        assert server.request("GET", path, headers={"If-None-Match": other})[2] == body


def test_ours_are_small_and_fetch_nothing_from_elsewhere() -> None:
    assert sum((FOLDER / name).stat().st_size for name in OURS) < MAX_PAGE_BYTES
    for name in OURS:
        text = (FOLDER / name).read_text()
        assert not re.search(r"https?:|//[a-z]+\.", text), name
        assert "innerHTML" not in text and not re.search(r"<script>|\son\w+=|style=", text), name
        for link in re.findall(r'(?:src|href)="([^"]+)"', text):
            # Relative, so that they work behind a proxy's path too.
            assert link in ("docs", "health", "openapi.json", "data:,") or (
                link.removeprefix("static/") in FILES
            ), link


def test_the_page_while_starting_and_with_a_key(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, api_keys=("secret",)) as server:
        server.state.status = "starting"
        status, _, body = server.request("GET", "/")
        assert status == 200 and b'<progress id="progress"' in body
        assert b"secret" not in body
        assert server.request("GET", "/docs")[0] == server.request("GET", "/openapi.json")[0] == 200
        server.state.status = "ready"


def test_swagger_ui_comes_with_its_licences() -> None:
    assert "Apache License" in (FOLDER / "swagger-ui.LICENSE.txt").read_text()
    bundle = (FOLDER / "swagger-ui-bundle.js").read_text()
    assert "swagger-ui-bundle.js.LICENSE.txt" in bundle[:200]
    assert "MIT" in (FOLDER / "swagger-ui-bundle.js.LICENSE.txt").read_text()
