"""A small hub on the loopback interface: the paths, headers and faults of the real one.

Large files are redirected to another host (localhost for 127.0.0.1), as the hub does it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.model.safetensors_files import entry, write

REPO = "org/name"
WEIGHTS = "model.safetensors"
PART_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
API = re.compile(r"/api/models/(.+)/revision/([^/?]+)\?blobs=true")
RESOLVE = re.compile(r"/(.+)/resolve/([^/]+)/(.+)")
CDN = "/cdn/a%2Fb+c/"  # a signed address must come back as it was sent


@dataclass
class Fault:
    """What happens to a request instead of its answer."""

    status: int = 0  # answered, with `headers`
    headers: dict[str, str] = field(default_factory=dict)
    hang_s: float = 0.0  # before the answer
    cut: int | None = None  # bytes sent before the connection is closed
    lie: int = 0  # added to the length of the file that is told
    corrupt: bool = False  # a byte is another
    no_range: bool = False  # answered whole


@dataclass
class Seen:
    """One request, as it was answered."""

    path: str
    range: str | None
    token: str | None
    sent: int = 0
    method: str = "GET"


class HubStub:
    """Repositories by name; `faults` by a part of the path: used up one by one, the last stays."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.gated = False
        self.private = False
        self.token = "hf_secret"
        self.faults: dict[str, list[Fault]] = {}
        self.rate: float | None = None  # bytes a second and stream
        self.names_only = False  # as mirrors list files: without sizes and checksums
        self.no_checksums = False  # nor are they told in another way
        self.is_proxy = False  # requests name the host too, as a proxy gets them
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        stub = self

        class Handler(_Handler):
            hub = stub

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, address: Any) -> None:
                """Clients that leave are what these tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """The hub is gone; closing it twice is fine."""
        if not self._thread.is_alive():
            return
        self.server.shutdown()
        self._thread.join(30)
        self.server.server_close()

    def add_folder(self, repo: str, folder: Path) -> None:
        self.repos[repo] = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
        }

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for part, faults in self.faults.items():
                if part in path and faults:
                    return faults.pop(0) if len(faults) > 1 else faults[0]
        return None

    def sent(self, part: str = "") -> int:
        """Bytes of bodies sent for paths that hold `part`."""
        return sum(seen.sent for seen in self.seen if part in seen.path)


def write_model(folder: Path, num_floats: int = 750_000) -> None:
    """A model of 3 MB, and a file that is never fetched."""
    folder.mkdir()
    size = 4 * num_floats
    write(
        folder / WEIGHTS,
        {"a": entry("F32", [num_floats], 0, size)},
        random.Random(0).randbytes(size),
    )
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")


@contextmanager
def running_hub() -> Iterator[HubStub]:
    hub = HubStub()
    try:
        yield hub
    finally:
        hub.close()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf", ".model"))


def etag_of(name: str, data: bytes) -> str:
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        if hub.is_proxy:
            _, _, path = self.path.removeprefix("http://").partition("/")
            self.path = f"/{path}" if self.path.startswith("http://") else "not for a proxy"
        authorization = self.headers.get("Authorization")
        seen = Seen(self.path, self.headers.get("Range"), authorization, method=self.command)
        hub.seen.append(seen)
        fault = hub.fault(self.path) or Fault()
        if fault.hang_s:
            time.sleep(fault.hang_s)
        if fault.status:
            return self._empty(fault.status, fault.headers)
        if self.path.startswith(CDN):
            etag = self.path.removeprefix(CDN)
            for files in hub.repos.values():
                for name, data in files.items():
                    if etag_of(name, data) == etag:
                        return self._send(data, etag, seen, fault)
            return self._empty(404, {})
        if match := API.fullmatch(self.path):
            return self._list(match[1], unquote(match[2]), authorization, seen)
        if match := RESOLVE.fullmatch(self.path):
            return self._resolve(match[1], match[2], unquote(match[3]), seen=seen, fault=fault)
        self._empty(404, {})

    def _may_read(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _list(self, repo: str, revision: str, token: str | None, seen: Seen) -> None:
        hub = self.hub
        files = hub.repos.get(repo)
        if files is None or (hub.private and not self._may_read()):
            return self._empty(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", hub.commit):
            return self._empty(404, {"X-Error-Code": "RevisionNotFound"})
        siblings: list[dict[str, Any]] = []
        for name, data in files.items():
            etag = etag_of(name, data)
            item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": etag[:40]}
            if is_large(name):
                item["lfs"] = {"sha256": etag, "size": len(data), "pointerSize": 134}
            siblings.append({"rfilename": name} if hub.names_only else item)
        body = json.dumps({"id": repo, "sha": hub.commit, "siblings": siblings}).encode()
        self._send(body, "listing", seen, Fault())

    def _resolve(self, repo: str, commit: str, name: str, *, seen: Seen, fault: Fault) -> None:
        hub = self.hub
        data = hub.repos.get(repo, {}).get(name)
        if hub.gated and not self._may_read():
            status = 403 if self.headers.get("Authorization") else 401
            return self._empty(status, {"X-Error-Code": "GatedRepo"})
        if data is None or commit != hub.commit:
            return self._empty(404, {"X-Error-Code": "EntryNotFound"})
        etag = etag_of(name, data)
        if not is_large(name):
            return self._send(data, etag, seen, fault)
        location = f"http://localhost:{hub.port}{CDN}{etag}"
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        self._empty(302, {"Location": location} | ({} if hub.no_checksums else linked))

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes, etag: str, seen: Seen, fault: Fault) -> None:
        size = len(data)
        start, end = 0, size
        if seen.range and not fault.no_range:
            first, last = seen.range.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size + fault.lie}")
            self.send_header("Content-Length", str(end - start))
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(size + fault.lie))
        self.send_header("ETag", 'W/"5e-17"' if self.hub.no_checksums else f'"{etag}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = end if fault.cut is None else min(end, start + fault.cut)
        if fault.corrupt:
            data = data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:]
        for at in range(start, stop, CHUNK_BYTES):
            piece = data[at : min(at + CHUNK_BYTES, stop)]
            self.wfile.write(piece)
            seen.sent += len(piece)
            if self.hub.rate:
                time.sleep(len(piece) / self.hub.rate)
        if stop < end or fault.lie:
            self.close_connection = True
