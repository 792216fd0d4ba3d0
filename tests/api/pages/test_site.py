"""The page, the docs and their files: types, caching, and nothing from anywhere else."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from pyserve.api.pages.site import CONTENT_TYPES, FILES, FOLDER
from tests.api.fakes import Server, run_server

MAX_PAGE_BYTES = 200_000  # of all that the page at / loads, vendored files too
MAX_LINES = 500
OURS = sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js"))
PATHS = ["/", "/docs", "/openapi.json", *(f"/static/{name}" for name in FILES)]
LINK = re.compile(r'(?:src|href)="([^"#]+)"')


@pytest.mark.parametrize("path", PATHS)
def test_types_and_caching(server: Server, path: str) -> None:
    status, headers, body = server.request("GET", path)
    assert status == 200 and body
    suffix = ".html" if path in ("/", "/docs") else Path(path).suffix
    assert headers["Content-Type"] == f"{CONTENT_TYPES[suffix]}; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-DNS-Prefetch-Control"] == "off"
    assert headers["Cache-Control"] == "no-cache"
    got, head, nothing = server.request("HEAD", path)
    assert (got, head["Content-Length"], nothing) == (200, str(len(body)), b"")
    for known in (headers["ETag"], f'"other", W/{headers["ETag"]}', "*"):
        got, again, nothing = server.request("GET", path, headers={"If-None-Match": known})
        assert (got, again["ETag"], nothing) == (304, headers["ETag"], b"")
        assert again["Content-Security-Policy"] == headers["Content-Security-Policy"]
    for other in ('"other"', "nonsense", '"'):
        assert server.request("GET", path, headers={"If-None-Match": other})[2] == body


@pytest.mark.parametrize("path", PATHS)
def test_the_policy_lets_nothing_run_or_load_from_elsewhere(server: Server, path: str) -> None:
    policy = server.request("GET", path)[1]["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == rules["connect-src"] == "'self'"
    assert not re.search(r"https?:|\*|unsafe-eval", policy)
    if path == "/docs":  # what Swagger UI needs
        assert (rules["style-src"], rules["img-src"]) == ("'self' 'unsafe-inline'", "'self' data:")
        return
    assert rules["style-src"] == rules["img-src"] == "'self'" and "unsafe" not in policy
    assert rules["require-trusted-types-for"] == "'script'"
    assert rules["trusted-types"] == "dompurify"


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_ours_are_readable_and_fetch_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES and max(map(len, text.splitlines())) <= 180
    assert not re.search(r"https?:/|//[a-z]+\.", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", text)
    links = LINK.findall(text) if path.suffix == ".html" else []
    for link in links + re.findall(r'from "\./([^"]+)"', text):
        # Relative, so that they work behind a proxy's path too.
        assert link in ("docs", "health", "metrics", "openapi.json") or (
            link.removeprefix("static/") in FILES
        ), link


def test_the_page_is_small_with_all_that_it_loads() -> None:
    names = {"page.html"}
    for name in LINK.findall((FOLDER / "page.html").read_text()):
        if name.startswith("static/") and not name.endswith(".json"):
            names.add(name.removeprefix("static/"))
    ours = {path.name for path in OURS if not path.name.startswith("docs.")}
    assert names >= ours  # the browser is told of all of them at once, not of one by the other
    assert {"vendor/marked.umd.js", "vendor/purify.min.js", "chat.css", "answer.js"} <= names
    assert sum((FOLDER / name).stat().st_size for name in names) < MAX_PAGE_BYTES


def test_every_file_has_a_path_and_other_names_teach(server: Server) -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    not_served = {"page.html", "docs.html", "vendor/README.md"}
    assert found - not_served == set(FILES)
    for asked, meant in (
        ("page.js/", "page.js"), ("pages.js", "page.js"), ("marked.umd.js", "vendor/marked.umd.js"),
        ("vendor/purify.js", "vendor/purify.min.js"), ("swagger-ui.css", "vendor/swagger-ui.css"),
    ):  # fmt: skip
        status, _, body = server.request("GET", f"/static/{asked}")
        assert status == 404
        assert f"use GET /static/{meant}" in json.loads(body)["error"]["message"]
    for name in not_served:
        assert server.request("GET", f"/static/{name}")[0] == 404
    status, headers, _ = server.request("POST", "/static/page.js")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_every_file_is_in_the_wheel() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    row = re.search(r'^"pyserve\.api\.pages" = (\[.+\])$', text, re.M)
    assert row is not None
    packed = {path for pattern in json.loads(row[1]) for path in FOLDER.parent.glob(pattern)}
    assert packed >= {path for path in FOLDER.rglob("*") if path.is_file()}


def test_the_page_while_starting_and_with_a_key(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, api_keys=("secret",)) as server:
        server.state.status = "starting"
        status, _, body = server.request("GET", "/")
        assert status == 200 and b'<progress id="progress"' in body
        assert b"secret" not in body
        assert server.request("GET", "/docs")[0] == server.request("GET", "/openapi.json")[0] == 200
        assert server.request("GET", "/static/vendor/marked.umd.js")[0] == 200
        server.state.status = "ready"


def test_vendored_files_are_as_they_were_published_and_have_their_licences() -> None:
    vendor = FOLDER / "vendor"
    rows = re.findall(
        r"^\| (\S+) \| .+ \| (.+) \| (\w{64}) \|$", (vendor / "README.md").read_text(), re.M
    )
    licences = {name for _, text, _ in rows for name in re.findall(r"[\w.-]+\.LICENSE\.txt", text)}
    assert {name for name, _, _ in rows} | licences | {"README.md"} == {
        path.name for path in vendor.iterdir()
    }
    for name, _, digest in rows:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
    for name, words in (
        ("swagger-ui.LICENSE.txt", "Apache License"), ("purify.LICENSE.txt", "Apache License"),
        ("swagger-ui-bundle.js.LICENSE.txt", "MIT"), ("marked.LICENSE.txt", "Permission is hereby"),
    ):  # fmt: skip
        assert words in (vendor / name).read_text(), name
