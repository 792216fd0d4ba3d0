"""The chat page at `/`, the page at `/docs`, and their files; nothing is fetched from other hosts.

They are public and the same for everybody. What they show of the server they request from its API,
with the API key that the user of the page enters.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

FOLDER = Path(__file__).parent / "static"
CONTENT_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
# Third-party files are in vendor/ as they were published, each with its licence.
FILES = tuple(
    sorted(
        path.relative_to(FOLDER).as_posix()
        for path in FOLDER.rglob("*.*")
        if path.suffix in CONTENT_TYPES and path.suffix != ".html"
    )
)
STATIC = "/static"
# Only the files in FILES can be requested.
STATIC_PATH = STATIC + "/{name:" + "|".join(map(re.escape, FILES)) + "}"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-DNS-Prefetch-Control": "off",  # else a link in an answer could leak data by a DNS look-up
    "Cache-Control": "no-cache",  # cached, but checked by its ETag on every use
}
# The page shows the model's answers as HTML. Should the sanitiser have a hole, this policy keeps
# scripts in an answer from running, and data from being fetched from or sent to another host. Only
# the sanitiser may turn text into elements (trusted-types).
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
# Swagger UI sets styles on its elements and draws with data: images.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


class File(NamedTuple):
    body: bytes
    content_type: str
    etag: str


async def index(request: web.Request) -> web.StreamResponse:
    """The page at `/`: the progress of the start-up, then a chat with the model."""
    return reply(request, _read("page.html"))


async def docs(request: web.Request) -> web.StreamResponse:
    """Swagger UI on /openapi.json."""
    return reply(request, _read("docs.html"), policy=DOCS_POLICY)


async def static(request: web.Request) -> web.StreamResponse:
    """A static file of these pages."""
    return reply(request, _read(request.match_info["name"]))


async def redirect(request: web.Request) -> web.StreamResponse:
    """Redirect to the form of the path, with or without a slash, that the page itself has.

    Only from there do its relative links lead to its files.
    """
    name = request.path.rstrip("/").rpartition("/")[2]
    location = f"../{name}" if request.path.endswith("/") else f"{name}/"
    return web.Response(status=308, headers={"Location": location})


def reply(request: web.Request, file: File, *, policy: str = PAGE_POLICY) -> web.Response:
    """A response with `file`, or a 304 where the client has it already.

    policy  its Content-Security-Policy: what the browser lets it load and run.
    """
    headers = {**HEADERS, "Content-Security-Policy": policy}
    if any(known.value in (file.etag, "*") for known in request.if_none_match or ()):
        response = web.Response(status=304, headers=headers)
    else:
        response = web.Response(
            body=file.body, content_type=file.content_type, charset="utf-8", headers=headers
        )
    response.headers["ETag"] = f'"{file.etag}"'
    return response


def make_file(body: bytes, suffix: str) -> File:
    """`body` as a File, with the content type for `suffix`."""
    return File(body, CONTENT_TYPES[suffix], hashlib.sha256(body).hexdigest()[:32])


@functools.cache
def _read(name: str) -> File:
    path = FOLDER / name
    return make_file(path.read_bytes(), path.suffix)
