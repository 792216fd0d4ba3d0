"""HubClient: lists the files of a repository on the hub at one commit, and reads ranges of them.

We do not download with huggingface_hub (2.4), because it starts a file from zero after a kill,
gives up where a connection stalls, and uses another HTTP library in each major version. Its
headers, endpoint and token are used. Temporary faults are retried a few times; everything else
raises one StartupError.
API: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from pyserve import log
from pyserve.errors import ConfigError, StartupError
from pyserve.hub.proxies import Proxy, settle_proxies

STALL_S = 30.0  # a connection that brings no byte for so long is given up
MAX_FAILURES = 5  # tries in a row that brought no byte, after which the download fails
BACKOFF_S = 1.0  # wait before the second try; it doubles before each further one
MAX_WAIT_S = 300.0  # longest wait that the hub may ask for: its rate limits span five minutes
MAX_LISTING_BYTES = 32 * 2**20
MAX_FILE_BYTES = 2**50
READ_BYTES = 2**20
NUM_QUESTIONS = 8  # concurrent HEAD requests about single files
IN_PART, OK = 206, 200
MOVED = (301, 302, 303, 307, 308)

COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's blob id, or the SHA-256 of a large file
RATE_LIMIT = re.compile(r"\bt=(\d+)")  # seconds until the limit is reset, in a RateLimit header

Write = Callable[[int, bytes], None]  # (offset in the file, data)


class UnreachableError(StartupError):
    """The hub did not answer, or only with server errors."""


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of a repository at one commit."""

    name: str  # its path in the repository
    size: int
    etag: str  # checksum of the contents, see ETAG


class Listing(msgspec.Struct, frozen=True):
    """The files of one commit, by name."""

    commit: str
    files: dict[str, RemoteFile]


class _Lfs(msgspec.Struct):
    sha256: str


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blobId: str | None = None
    lfs: _Lfs | None = None


class _ModelInfo(msgspec.Struct):
    sha: str
    siblings: list[_Sibling] = []


class _Transient(Exception):
    """A fault that may be gone at the next try.

    wait_s  how long the hub asked us to wait, in s; None: it did not.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class HubClient:
    """Reads one repository at one revision. An async context manager, which holds connections.

    named     how messages call the model: the flag and its value.
    endpoint  URL of the hub or of a mirror.
    headers   User-Agent and, where there is a token, Authorization. The token is sent only to the
              endpoint's host, and not to hosts that it redirects to.
    """

    def __init__(
        self, repo: str, revision: str, *, named: str, endpoint: str, headers: Mapping[str, str]
    ) -> None:
        self._repo = repo
        self._revision = revision
        self._named = named
        self._endpoint = endpoint.rstrip("/")
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._has_token = any(name.lower() == "authorization" for name in headers)
        self._locations: dict[str, URL] = {}  # file name -> URL that the hub redirected to
        self._resume_s = 0.0  # monotonic time before which no request may be sent
        self._proxy: Proxy | None = None  # proxy that requests to the hub go through
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HubClient:
        try:
            if not re.match(r"https?://[^/]", self._endpoint):
                raise ValueError(self._endpoint)
            endpoint = URL(self._endpoint)
        except ValueError:
            raise ConfigError(f"HF_ENDPOINT must be a http address, got {self._endpoint}") from None
        self._proxy = settle_proxies(endpoint)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S),
            trust_env=True,  # uses the proxies that settle_proxies has put into the environment
            auto_decompress=False,
            read_bufsize=READ_BYTES,
            requote_redirect_url=False,  # a signed URL is valid only exactly as it was sent
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def listing(self, is_wanted: Callable[[str], bool]) -> Listing:
        """The files of the commit, by one request.

        Some mirrors list names without sizes and checksums. Then one more request is sent for each
        file whose name `is_wanted`, and the other files are left out. Raises StartupError, such as
        where there is no such model, the token does not open it, or the hub cannot be reached.
        """
        url = f"{self._endpoint}/api/models/{self._repo}/revision/{quote(self._revision, safe='')}"
        failures = 0
        while True:
            try:
                async with await self._get(URL(f"{url}?blobs=true", encoded=True), {}) as response:
                    self._check_status(response, None)
                    text = await response.content.read(MAX_LISTING_BYTES)
                    while data := await response.content.read(MAX_LISTING_BYTES - len(text)):
                        text += data
                break
            except (aiohttp.ClientError, asyncio.TimeoutError, _Transient) as error:
                failures += 1
                await self._pause("the list of files", error, failures)
        info = self._parse(text)
        found = [_listed(item) for item in info.siblings]
        files = {file.name: file for file in found if file is not None}
        bare = [
            item.rfilename
            for item in info.siblings
            if item.rfilename not in files and is_wanted(item.rfilename)
        ]
        streams = asyncio.Semaphore(NUM_QUESTIONS)
        asked = await asyncio.gather(*[self._describe(name, info.sha, streams) for name in bare])
        return Listing(info.sha, files | {file.name: file for file in asked})

    async def _describe(self, name: str, commit: str, streams: asyncio.Semaphore) -> RemoteFile:
        """Request the size and checksum of a file that was listed with its name only."""
        failures = 0
        while True:
            try:
                async with streams, await self._head(name, commit) as response:
                    if response.status not in MOVED:
                        self._check_status(response, RemoteFile(name, 0, ""))
                    file = _described(name, response.headers)
                break
            except (aiohttp.ClientError, asyncio.TimeoutError, _Transient) as error:
                failures += 1
                await self._pause(name, error, failures)
        if file is None:
            raise StartupError(
                f"{self._named}: {self._endpoint} tells no size and checksum of {name[:200]} as "
                "the hub does: fetch the model with another tool, and pass its folder"
            )
        return file

    async def read(self, file: RemoteFile, start: int, end: int, *, commit: str) -> bytes:
        """The bytes [start, end) of a file, which are kept in memory. Raises StartupError."""
        pieces: list[bytes] = []
        await self.fetch(file, start, end, commit=commit, write=lambda _, data: pieces.append(data))
        return b"".join(pieces)

    async def fetch(
        self, file: RemoteFile, start: int, end: int, *, commit: str, write: Write
    ) -> None:
        """Fetch the bytes [start, end) of a file and pass them to `write` in order.

        Raises StartupError, and what `write` raises.
        """
        done, failures = start, 0
        while done < end:
            began = done
            try:
                async with await self._request(file, done, end, commit) as response:
                    self._check_status(response, file)
                    self._check_length(response, file, done, end)
                    async for data in response.content.iter_any():
                        data = data[: end - done]
                        write(done, data)
                        done += len(data)
                        if done == end:
                            return
                raise _Transient(f"the connection ended {end - done} bytes early")
            except (aiohttp.ClientError, asyncio.TimeoutError, _Transient) as error:
                failures = 1 if done > began else failures + 1
                await self._pause(file.name, error, failures)

    async def _request(
        self, file: RemoteFile, start: int, end: int, commit: str
    ) -> aiohttp.ClientResponse:
        # A whole file is requested without a Range header, which not every proxy supports.
        is_whole = start == 0 and end == file.size
        headers = {} if is_whole else {"Range": f"bytes={start}-{end - 1}"}
        known = self._locations.get(file.name)
        if known is not None:
            return await self._get(known, headers)
        response = await self._get(self._url(file.name, commit), headers)
        if response.history and response.status in (OK, IN_PART):
            self._locations[file.name] = response.url
        return response

    def _url(self, name: str, commit: str) -> URL:
        url = f"{self._endpoint}/{self._repo}/resolve/{commit}/{quote(name)}"
        return URL(url, encoded=True)

    async def _head(self, name: str, commit: str) -> aiohttp.ClientResponse:
        """HEAD of a file at the hub itself, without following a redirect."""
        assert self._session is not None
        await asyncio.sleep(max(0.0, self._resume_s - time.monotonic()))
        return await self._session.head(
            self._url(name, commit), headers=self._headers, allow_redirects=False
        )

    async def _get(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """GET `url`, without the token if it is on another host, as aiohttp does for redirects."""
        assert self._session is not None
        await asyncio.sleep(max(0.0, self._resume_s - time.monotonic()))
        own = self._headers
        if url.origin() != URL(self._endpoint).origin():
            own = {name: value for name, value in own.items() if name.lower() != "authorization"}
        return await self._session.get(url, headers={**own, **headers})

    def _check_status(self, response: aiohttp.ClientResponse, file: RemoteFile | None) -> None:
        status = response.status
        if status in (OK, IN_PART):
            return
        if status in (408, 429) or status >= 500:
            raise _Transient(_reason(status), _asked_wait_s(response.headers))
        code = response.headers.get("X-Error-Code")
        if file is not None and code is None and file.name in self._locations:
            del self._locations[file.name]
            raise _Transient(f"an address that no longer works (status {status})")
        raise StartupError(self._refusal(status, code, file))

    def _refusal(self, status: int, code: str | None, file: RemoteFile | None) -> str:
        page = f"{self._endpoint}/{self._repo}"
        how = "pass an access token with --hf-token TOKEN or in HF_TOKEN"
        if code == "GatedRepo":
            if self._has_token:
                return (
                    f"{self._named} is gated, and the account of your token may not read it yet: "
                    f"accept its terms at {page}"
                )
            return f"{self._named} is gated: accept its terms at {page}, then {how}"
        if code == "RevisionNotFound":
            return f"{self._named} has no revision {self._revision}, see {page}"
        if file is not None and status == 404:
            return f"{self._named}: the hub lists {file.name} but does not have it"
        if status == 401 or status == 404:
            line = f"{self._named} is not at {page} (revision {self._revision}), or it is private: "
            return line + ("your token does not open it" if self._has_token else how)
        if status == 403:
            return f"{self._named}: {page} may not be read (status 403): {how} that may read it"
        return f"{self._named}: the hub answers with status {status} at {page}"

    def _check_length(
        self, response: aiohttp.ClientResponse, file: RemoteFile, start: int, end: int
    ) -> None:
        """Check that the response is the requested range of a file of the listed size.

        Raises StartupError where the server does not support ranges, else _Transient.
        """
        if response.status == IN_PART:
            sent = response.headers.get("Content-Range", "")
            wanted = f"bytes {start}-{end - 1}/{file.size}"
        else:
            if start > 0:
                raise StartupError(
                    f"{self._named}: the server does not send parts of files (Range), which a "
                    f"download that goes on needs"
                )
            sent = response.headers.get("Content-Length", str(file.size))
            wanted = str(file.size)
        if sent != wanted:
            raise _Transient(f"the server sends {sent[:80]!r} where {wanted!r} is listed")

    def _parse(self, text: bytes) -> _ModelInfo:
        try:
            info = msgspec.json.decode(text, type=_ModelInfo)
        except (msgspec.DecodeError, UnicodeDecodeError):
            info = None
        if info is None or not COMMIT.fullmatch(info.sha):
            raise StartupError(f"{self._named}: {self._endpoint} does not answer as the hub does")
        return info

    async def _pause(self, what: str, error: Exception, failures: int) -> None:
        """Wait before the next try. Raises UnreachableError if `error` is final or `failures` is
        MAX_FAILURES.
        """
        reason = _describe(error)
        if isinstance(error, aiohttp.ClientProxyConnectionError) and self._proxy is not None:
            reason = f"the proxy {self._proxy.address} ({self._proxy.variable}) cannot be reached"
        wait_s = error.wait_s if isinstance(error, _Transient) else None
        is_final = isinstance(
            error, (aiohttp.InvalidURL, aiohttp.TooManyRedirects, aiohttp.ClientSSLError)
        )
        if is_final or failures >= MAX_FAILURES or (wait_s or 0.0) > MAX_WAIT_S:
            asks = f", it asks to wait {wait_s:.0f} s" if wait_s else ""
            tries = f", {failures} times" if failures > 1 else ""
            raise UnreachableError(
                f"{self._named}: the hub at {self._endpoint} fails on {what}: {reason}{tries}{asks}"
            ) from error
        was_waiting = self._resume_s > time.monotonic()
        if wait_s is not None:  # the hub asked for it, so all streams wait
            self._resume_s = max(self._resume_s, time.monotonic() + wait_s)
        else:
            wait_s = BACKOFF_S * 2 ** (failures - 1)
        if not was_waiting:
            log.get_logger().warning(
                "%s: %s: %s; trying again in %.0f s (%d of %d)",
                self._named, what, reason, wait_s, failures, MAX_FAILURES - 1,
            )  # fmt: skip
        await asyncio.sleep(wait_s)


def _listed(item: _Sibling) -> RemoteFile | None:
    """A file from the hub's listing; None where size or checksum are missing or invalid."""
    etag = item.lfs.sha256 if item.lfs is not None else item.blobId
    return _remote_file(item.rfilename, item.size, etag)


def _described(name: str, headers: Mapping[str, str]) -> RemoteFile | None:
    """A file from the headers of a HEAD response; None where size or checksum are invalid."""
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    return _remote_file(
        name,
        int(size) if size.isdecimal() and len(size) < 20 else None,
        etag.removeprefix("W/").strip('"'),
    )


def _remote_file(name: str, size: int | None, etag: str | None) -> RemoteFile | None:
    if size is None or not 0 <= size <= MAX_FILE_BYTES:
        return None
    return RemoteFile(name, size, etag) if etag and ETAG.fullmatch(etag) else None


def _reason(status: int) -> str:
    if status == 429:
        return "too many requests from this address (status 429), a token raises the limit"
    return f"status {status}"


def _asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks to wait, from Retry-After or RateLimit; None where it does not."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    limit = RATE_LIMIT.search(headers.get("RateLimit", ""))
    return float(limit.group(1)[:9]) if limit else None


def _describe(error: Exception) -> str:
    if isinstance(error, _Transient):
        return str(error)
    if isinstance(error, asyncio.TimeoutError):
        return f"no byte for {STALL_S:.0f} s"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy refuses it (status {error.status})"
    if isinstance(error, aiohttp.ClientSSLError):
        return "no trust in its certificate (ca-certificates, or SSL_CERT_FILE)"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "it cannot be reached"
    return f"the connection broke ({type(error).__name__})"
