"""The page at `/`, the docs and their files: all of this server, nothing fetched from elsewhere.

They are public and the same for everybody: what they show of the server they ask it for, with the
key of whoever looks at them.
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
# Those of others are in vendor/, as they are published, each with its licence.
FILES = tuple(
    sorted(
        path.relative_to(FOLDER).as_posix()
        for path in FOLDER.rglob("*.*")
        if path.suffix in CONTENT_TYPES and path.suffix != ".html"
    )
)
STATIC = "/static"
STATIC_PATH = STATIC + "/{name:" + "|".join(map(re.escape, FILES)) + "}"  # no other file has a path
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-DNS-Prefetch-Control": "off",  # a link in an answer would tell its host by a look-up
    "Cache-Control": "no-cache",  # kept, but asked for again: by its ETag, which costs no bytes
}
# What an answer says reaches the elements of the page: should the sanitiser have a hole, this keeps
# scripts from running, and anything from being fetched from or sent to another host. Only the
# sanitiser may make elements from text (trusted-types).
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
    """What the server is doing while it starts; then a chat with the model."""
    return reply(request, _read("page.html"))


async def docs(request: web.Request) -> web.StreamResponse:
    """Swagger UI on /openapi.json."""
    return reply(request, _read("docs.html"), policy=DOCS_POLICY)


async def static(request: web.Request) -> web.StreamResponse:
    """A file of theirs."""
    return reply(request, _read(request.match_info["name"]))


async def redirect(request: web.Request) -> web.StreamResponse:
    """To the spelling from which a page's links, which are relative, lead to its files."""
    name = request.path.rstrip("/").rpartition("/")[2]
    location = f"../{name}" if request.path.endswith("/") else f"{name}/"
    return web.Response(status=308, headers={"Location": location})


def reply(request: web.Request, file: File, *, policy: str = PAGE_POLICY) -> web.Response:
    """`file`, or 304 where the client has it; `policy` is what it may load and run in a browser."""
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
    """`body` with the type that goes with `suffix`."""
    return File(body, CONTENT_TYPES[suffix], hashlib.sha256(body).hexdigest()[:32])


@functools.cache
def _read(name: str) -> File:
    path = FOLDER / name
    return make_file(path.read_bytes(), path.suffix)
