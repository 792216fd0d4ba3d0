"""/v1/files: input and output files of batches, streamed to and from the folder of --batch-dir."""

from __future__ import annotations

import asyncio
import os
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

from aiohttp import BodyPartReader, MultipartReader, StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError

from pyserve.api.batches.service import BatchService
from pyserve.api.batches.store import StorageError, Store
from pyserve.api.endpoints.body import ignored_header
from pyserve.api.endpoints.query import part_of, read_query
from pyserve.api.http.bounds import PIECE_BYTES
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.http.delivery import json_response
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.http.keys import USER
from pyserve.api.state import STATE
from pyserve.api.wire.batches import FileDeleted, FileList, FileObject
from pyserve.api.wire.queries import FileListQuery
from pyserve.errors import BodyTooLargeError, BodyTooLateError, InvalidRequestError

OF_THE_FORM = 2**16  # allowance for the form's bytes besides the file, in the Content-Length check
SILENCE_S = 30.0  # an upload fails if no data has come for so long
CHUNK_BYTES = 2**18  # read from or written to disk at once
MAX_FILENAME_CHARS = 255  # a longer name is cut
MAX_FIELD_BYTES = 1024  # of a form field that is not the file
MAX_PARTS = 16
MAX_LINES = 1024  # lines of the form outside its parts' contents


def service_of(request: web.Request) -> tuple[BatchService, str]:
    """The server's batch service, and the owner that the request's API key stands for.

    Raises InvalidRequestError if the server keeps no files and batches.
    """
    batches = request.app[STATE].batches
    if batches is None:
        raise InvalidRequestError(
            "files and batches are off: start the server with --batch-dir DIR, which keeps them"
        )
    return batches, batches.owner_of(request[USER])


async def upload_file(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    store = batches.store
    if is_foreign_page(request):  # browsers send forms without a CORS preflight; see http/cors.py
        raise InvalidRequestError("a page of another host may not upload files")
    announced = request.content_length or 0
    if announced > store.max_file_bytes + OF_THE_FORM:
        raise _too_large(store)
    store.check_count(owner)
    store.check_room(announced)
    path = store.new_path()
    upload = _Upload(store, path)
    try:
        with connection_of(request).receiving():
            await upload.read(request)
        if upload.purpose is None or upload.filename is None:
            missing = "purpose" if upload.purpose is None else "file"
            raise InvalidRequestError(f"{missing} is missing", missing)
        file = await asyncio.to_thread(
            store.add_file, owner, path, filename=upload.filename, purpose=upload.purpose
        )
    except OSError as error:
        raise StorageError(f"the file cannot be kept: {os.strerror(error.errno or 0)}") from None
    finally:
        store.num_upload_bytes -= upload.num_bytes
        path.unlink(missing_ok=True)
    return json_response(file, ignored_header(upload.ignored))


async def list_files(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    query = read_query(request, FileListQuery)
    files = [f for f in batches.store.files(owner) if query.purpose in (None, f.purpose)]
    return json_response(part_of(FileList, files, attrgetter("id"), query))


async def retrieve_file(request: web.Request) -> web.StreamResponse:
    return json_response(_file(request))


async def file_content(request: web.Request) -> web.StreamResponse:
    batches, _ = service_of(request)
    file = _file(request)
    response = web.StreamResponse(headers={"X-Content-Type-Options": "nosniff"})
    response.content_type = "application/octet-stream"
    response.content_length = file.bytes
    try:
        source = batches.store.content_path(file.id).open("rb")
    except OSError as error:
        raise StorageError(f"it cannot be read: {os.strerror(error.errno or 0)}") from None
    with source:
        await response.prepare(request)
        while request.method != "HEAD" and (data := await asyncio.to_thread(_read, source)):
            for start in range(0, len(data), PIECE_BYTES):
                await response.write(data[start : start + PIECE_BYTES])
                await request.writer.drain()
    await response.write_eof()
    return response


async def delete_file(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    id = request.match_info["file_id"]
    batches.store.delete_file(owner, id)
    return json_response(FileDeleted(id=id))


def _file(request: web.Request) -> FileObject:
    batches, owner = service_of(request)
    return batches.store.file(owner, request.match_info["file_id"])


def _read(source: BinaryIO) -> bytes:
    return source.read(CHUNK_BYTES)


def _too_large(store: Store) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the file is larger than {store.max_file_bytes} bytes (--batch-max-file-bytes)", "file"
    )


class _Upload:
    """Reads an upload form. Its file is written to `path` chunk by chunk, never held in memory.

    ignored    names of form fields that have no effect.
    num_bytes  bytes of the file so far, which Store.num_upload_bytes includes until the upload
               ends.
    """

    def __init__(self, store: Store, path: Path) -> None:
        self.filename: str | None = None
        self.purpose: str | None = None
        self.ignored: list[str] = []
        self.num_bytes = 0
        self._store = store
        self._path = path

    async def read(self, request: web.Request) -> None:
        """Read the whole form. Raises RequestError, and OSError if the file cannot be written."""
        try:
            await self._read_parts(request)
        except asyncio.TimeoutError:
            raise BodyTooLateError(f"nothing of the body has come for {SILENCE_S:.0f} s") from None
        except (ValueError, AssertionError, RuntimeError, HttpProcessingError, LookupError):
            raise InvalidRequestError("the body is no valid multipart/form-data") from None
        except web.RequestPayloadError:
            raise InvalidRequestError("the body is cut off or badly encoded") from None

    async def _read_parts(self, request: web.Request) -> None:
        if not request.content_type == "multipart/form-data":
            raise InvalidRequestError("the Content-Type must be multipart/form-data")
        content = cast(StreamReader, _FewLines(request.content))
        reader = MultipartReader(request.headers, content)
        for _ in range(MAX_PARTS):
            part = await asyncio.wait_for(reader.next(), SILENCE_S)
            if part is None:
                return
            if not isinstance(part, BodyPartReader):
                raise InvalidRequestError("a form inside a form is not supported")
            if part.name == "file":
                await self._keep(part)
            elif part.name == "purpose":
                self.purpose = (await self._text(part)).decode("utf-8", "replace")
                if self.purpose != "batch":
                    raise InvalidRequestError(
                        f"purpose must be batch, got {self.purpose[:100]}", "purpose"
                    )
            else:
                await self._text(part)
                self.ignored.append(part.name or "?")
        raise InvalidRequestError(f"the form has more than {MAX_PARTS} parts")

    async def _text(self, part: BodyPartReader) -> bytes:
        text = b""
        while data := await asyncio.wait_for(part.read_chunk(), SILENCE_S):
            text += data
            if len(text) > MAX_FIELD_BYTES:
                raise InvalidRequestError(
                    f"{(part.name or '?')[:100]} has more than {MAX_FIELD_BYTES} bytes"
                )
        return text

    async def _keep(self, part: BodyPartReader) -> None:
        if self.filename is not None:
            raise InvalidRequestError("the form has two files", "file")
        encoding = part.headers.get("Content-Transfer-Encoding", "binary").lower()
        if encoding not in ("binary", "8bit"):
            raise InvalidRequestError("the file must be sent as it is, without a transfer encoding")
        name = (part.filename or "file")[:MAX_FILENAME_CHARS]
        # A name whose bytes were not UTF-8 has surrogates, which cannot be encoded: replace them.
        self.filename = name.encode("utf-8", "replace").decode()
        with self._path.open("wb") as sink:
            while data := await asyncio.wait_for(part.read_chunk(CHUNK_BYTES), SILENCE_S):
                if self.num_bytes + len(data) > self._store.max_file_bytes:
                    raise _too_large(self._store)
                self._store.check_room(len(data))
                self.num_bytes += len(data)
                self._store.num_upload_bytes += len(data)
                await asyncio.to_thread(sink.write, data)
            await asyncio.to_thread(_sync, sink)


class _FewLines:
    """A request body that allows MAX_LINES calls of `readline`; anything else is passed through.

    Any number of lines may precede the first part of a form. aiohttp's reader skips those that have
    already arrived without yielding, so they could block the event loop.
    """

    def __init__(self, content: StreamReader) -> None:
        self._content = content
        self._num_lines = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def readline(self, **options: Any) -> bytes:
        self._num_lines += 1
        if self._num_lines > MAX_LINES:
            raise InvalidRequestError(f"the form has more than {MAX_LINES} lines beside its parts")
        return await self._content.readline(**options)


def _sync(sink: BinaryIO) -> None:
    sink.flush()
    os.fsync(sink.fileno())
