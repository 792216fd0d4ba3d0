"""BatchService: runs the batches of /v1/batches beside clients' requests, one per owner at a time.

    validating -> in_progress -> finalizing -> completed
        |             |-> cancelling -> cancelled
        |-> failed    |-> expired

Every line is sent as an HTTP request of the server to itself (work.py, http/inner.py), in the
background: requests of clients go first. The answers are kept in a journal. When the process ends,
unfinished batches stay as they are, and the next process continues them once it is ready.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from pyserve.api.batches.journal import Journal, JournalError, has_failed, open_input
from pyserve.api.batches.lines import (
    BadLineError,
    BatchLine,
    lines_of,
    make_output,
    max_line_bytes,
    read_line,
)
from pyserve.api.batches.store import ENDED, FILES_OF_A_BATCH, StorageError, Store
from pyserve.api.batches.work import BatchWork, EngineStoppedError
from pyserve.api.http.inner import InnerClient
from pyserve.api.wire.batches import Batch, BatchError, BatchErrors, RequestCounts
from pyserve.client import EngineClient
from pyserve.errors import InvalidRequestError
from pyserve.log import get_logger

P = ParamSpec("P")
T = TypeVar("T")

WINDOW_S = 24 * 3600  # a batch expires after this time
MAX_LINES = 50_000  # OpenAI's limit
MAX_SHOWN_ERRORS = 20  # errors that are listed of an input that is refused
MAX_UNFINISHED = 100  # unfinished batches of one owner
_EXPIRED = (
    b'{"error":{"message":"the batch has expired before this line was asked",'
    b'"type":"BatchExpiredError","param":null,"code":"batch_expired"}}'
)


class BatchService:
    """The store, and the tasks that run its batches. All methods run on the event loop, except
    those marked as running on a thread.

    store           the files and batches of all owners.
    owner_of        user -> a name for it that is the same in the next process (Keys.owner).
    users           all users; empty: no API key is needed.
    max_inflight    lines of a batch that are in flight at once; None: the engine's max_num_seqs.
    max_body_bytes  maximum size of a line's request body.
    """

    def __init__(
        self, store: Store, *, owner_of: Callable[[str], str], users: tuple[str, ...],
        max_inflight: int | None, max_body_bytes: int,
    ) -> None:  # fmt: skip
        self.store = store
        self.owner_of = owner_of
        self._users = {owner_of(user): user for user in users or ("",)}
        self._max_inflight = max_inflight
        self._max_body_bytes = max_body_bytes
        self._engine: EngineClient | None = None
        self._ask: Callable[[str], InnerClient] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}  # owner -> the task that runs its batches
        self._journals: dict[str, Journal] = {}  # batch id -> its open journal
        self._working: dict[str, asyncio.Task[None]] = {}  # batch id -> the task that `cancel` ends
        self._running: set[str] = set()  # ids of the batches that run now, one per owner

    def start(self, engine: EngineClient, ask: Callable[[str], InnerClient]) -> None:
        """Start when the model is ready, and continue unfinished batches.

        ask  makes a client of the server's own for a user.
        """
        self._engine, self._ask = engine, ask
        for owner in {owner for owner, _ in self.store.unfinished()}:
            self._begin(owner)

    async def stop(self) -> None:
        """Stop all batches where they are; the next process continues them."""
        self._ask = None
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def close(self) -> None:
        self.store.close()

    # -- requests of clients -----------------------------------------------------------------------

    async def create(self, owner: str, batch: Batch) -> None:
        """Store a new batch, which runs when its owner's earlier ones have ended.

        Raises RequestError.
        """
        await self._keeping(self._add, owner, batch)
        self._begin(owner)

    async def cancel(self, owner: str, id: str) -> Batch:
        """Cancel a batch; returns it.

        Raises NotFoundError, and InvalidRequestError where it has ended or is finalizing.
        """

        def cancelled(batch: Batch) -> Batch:
            if batch.status in (*ENDED, "finalizing"):
                raise InvalidRequestError(f"{id} is {batch.status} and cannot be cancelled")
            if batch.status == "cancelling":
                return batch
            is_waiting = batch.status == "validating" and id not in self._running
            batch = _moved(batch, "cancelling")
            # A batch that has not begun has no answers to write, so it is cancelled at once.
            return _moved(batch, "cancelled") if is_waiting else batch

        batch = await self._change(owner, id, cancelled)
        working = self._working.get(id)
        if working is not None:
            working.cancel()
        return self.shown(batch)

    def shown(self, batch: Batch) -> Batch:
        """`batch` with the present request counts, if it is running."""
        journal = self._journals.get(batch.id)
        if journal is None:
            return batch
        return msgspec.structs.replace(batch, request_counts=_counts(journal))

    # -- running batches ---------------------------------------------------------------------------

    def _begin(self, owner: str) -> None:
        last = self._tasks.get(owner)
        if self._ask is not None and (last is None or last.done()):
            task = asyncio.ensure_future(self._run_all(owner))
            self._tasks[owner] = task
            task.add_done_callback(partial(self._ended, owner))

    def _ended(self, owner: str, task: asyncio.Task[None]) -> None:
        if self._tasks[owner] is task:
            del self._tasks[owner]
        if not task.cancelled() and (error := task.exception()) is not None:
            get_logger().error("batches have stopped unexpectedly", exc_info=error)

    async def _run_all(self, owner: str) -> None:
        while True:
            batch = next((b for other, b in self.store.unfinished() if other == owner), None)
            if batch is None:
                return
            self._running.add(batch.id)
            try:
                await self._run(owner, batch)
            except EngineStoppedError:
                return  # the next process continues the batch
            except (JournalError, StorageError, OSError) as error:
                get_logger().error("%s: %s", batch.id, error)
                self.store.journal_path(batch.id).unlink(missing_ok=True)
                await self._fail(owner, batch.id, [BatchError(code="storage", message=str(error))])
            finally:
                self._running.discard(batch.id)

    async def _run(self, owner: str, batch: Batch) -> None:
        """Run a batch from its present status to its end."""
        if owner not in self._users:
            error = BatchError(code="no_key", message="the API key that made it is no longer one")
            await self._fail(owner, batch.id, [error])
            return
        source = self.store.content_path(batch.input_file_id)
        digest, num_lines, errors = await asyncio.to_thread(
            self._look_through, source, batch.endpoint
        )
        if batch.status == "validating" and errors:
            await self._fail(owner, batch.id, errors)
            return
        journal = await asyncio.to_thread(
            Journal, self.store.journal_path(batch.id), input_digest=digest, num_lines=num_lines
        )
        self._journals[batch.id] = journal
        try:
            # This reads the batch again, as it may have been cancelled meanwhile.
            batch = await self._change(owner, batch.id, _begun)
            if batch.status not in ENDED:
                end = await self._answer(owner, batch, journal, source)
                await self._finish(owner, batch.id, journal, end)
        finally:
            del self._journals[batch.id]
            self._count_journals()
            journal.close()
        self.store.journal_path(batch.id).unlink(missing_ok=True)

    async def _answer(self, owner: str, batch: Batch, journal: Journal, source: Path) -> Any:
        """Send the lines that have no answer; returns the status that the batch is to end in."""
        if batch.status in ("cancelling", "finalizing"):
            return "cancelled" if batch.status == "cancelling" else "completed"
        assert self._engine is not None and self._ask is not None
        with open_input(source) as file:
            work = BatchWork(
                journal, file, partial(self._ask, self._users[owner]), engine=self._engine,
                max_inflight=self._max_inflight or self._engine.info.max_num_seqs,
                max_body_bytes=self._max_body_bytes, check=self._check_room,
            )  # fmt: skip
            working = asyncio.ensure_future(work.run())
            self._working[batch.id] = working
            if self.store.batch(owner, batch.id).status == "cancelling":
                working.cancel()  # `cancel` was called before this task existed
            try:
                left_s = max(batch.expires_at - time.time(), 0.0)
                await asyncio.wait([working], timeout=left_s)
            finally:
                del self._working[batch.id]
                is_over = working.done() and not working.cancelled()
                working.cancel()
                await asyncio.wait([working])
            if is_over:
                working.result()
                return "completed"
            if self.store.batch(owner, batch.id).status == "cancelling":
                return "cancelled"
            file.seek(0)
            await asyncio.to_thread(self._expire, journal, file)
            return "expired"

    def _check_room(self, line: BatchLine) -> None:
        self._count_journals()
        self.store.check_room(0)

    def _count_journals(self) -> None:
        journals = sum(journal.num_bytes for journal in self._journals.values())
        self.store.num_journal_bytes = journals

    def _expire(self, journal: Journal, file: Any) -> None:
        """On a thread: give each line that has no answer the error that the batch has expired."""
        for number, data in lines_of(file, max_bytes=max_line_bytes(self._max_body_bytes)):
            if not journal.is_done(number):
                custom_id = read_line(data, max_body_bytes=self._max_body_bytes).custom_id
                line = make_output(custom_id, "", 408, _EXPIRED)
                journal.put(number, line, has_failed=True)

    async def _finish(self, owner: str, id: str, journal: Journal, end: Any) -> None:
        """Write the output and error files of a batch, then set its last status.

        That is `end`, or "cancelled" where the batch is being cancelled.
        """

        def finalizing(batch: Batch) -> Batch:
            is_next = end == "completed" and batch.status == "in_progress"
            return _moved(batch, "finalizing") if is_next else batch

        def finished(batch: Batch) -> Batch:
            last = "cancelled" if batch.status == "cancelling" else end
            batch = msgspec.structs.replace(
                batch, output_file_id=ids[0], error_file_id=ids[1], request_counts=_counts(journal)
            )
            return _moved(batch, last)

        batch = await self._change(owner, id, finalizing)
        ids = [batch.output_file_id, batch.error_file_id]
        for index, (name, is_wanted) in enumerate(
            (("output", lambda line: not has_failed(line)), ("error", has_failed))
        ):
            if ids[index] is None:
                ids[index] = await asyncio.to_thread(
                    self._write_file, owner, journal, f"{id}_{name}.jsonl", is_wanted
                )
        batch = await self._change(owner, id, finished)
        get_logger().info("%s: %s, %d of %d lines answered, %d failed", id, batch.status,
                          journal.num_done, journal.num_lines, journal.num_failed)  # fmt: skip

    def _write_file(
        self, owner: str, journal: Journal, filename: str, is_wanted: Callable[[bytes], bool]
    ) -> str | None:
        """On a thread: write the lines that `is_wanted` accepts into a file of the owner's.

        Returns the id of the file; None where it would be empty, and is not made.
        """
        path = self.store.new_path()
        num_lines = journal.copy(path, is_wanted)
        if not num_lines:
            path.unlink()
            return None
        return self.store.add_file(owner, path, filename=filename, purpose="batch_output").id

    async def _fail(self, owner: str, id: str, errors: list[BatchError]) -> None:
        def failed(batch: Batch) -> Batch:
            if batch.status in ENDED:
                return batch
            batch = msgspec.structs.replace(batch, errors=BatchErrors(data=errors))
            return _moved(batch, "failed")

        await self._change(owner, id, failed)
        get_logger().info("%s: failed: %s", id, errors[0].code)

    def _add(self, owner: str, batch: Batch) -> None:
        """On a thread: store a new batch. Raises RequestError, OSError."""
        with self.store.changing:
            num_unfinished = sum(other == owner for other, _ in self.store.unfinished())
            if num_unfinished >= MAX_UNFINISHED:
                raise InvalidRequestError(
                    f"{num_unfinished} batches of yours have not ended, "
                    f"the limit is {MAX_UNFINISHED}"
                )
            self.store.check_count(owner, FILES_OF_A_BATCH)
            self.store.check_room(self.store.file(owner, batch.input_file_id).bytes)
            self.store.save(owner, batch)

    async def _change(self, owner: str, id: str, change: Callable[[Batch], Batch]) -> Batch:
        """Store.change on a thread; raises StorageError in place of OSError."""
        return await self._keeping(self.store.change, owner, id, change)

    async def _keeping(self, keep: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(keep, *args, **kwargs)
        except OSError as error:
            raise StorageError(f"the batch cannot be kept: {error.strerror}") from None

    def _look_through(self, source: Path, endpoint: str) -> tuple[str, int, list[BatchError]]:
        """On a thread: validate an input.

        Returns its SHA-256, its number of lines (at most MAX_LINES + 1) and the errors found.
        """
        errors: list[BatchError] = []
        ids: set[bytes] = set()
        digest = hashlib.sha256()
        num_lines = 0
        with open_input(source) as file:
            for number, data in lines_of(file, max_bytes=max_line_bytes(self._max_body_bytes)):
                digest.update(data)
                num_lines += 1
                if num_lines > MAX_LINES:  # refused anyway, so further lines would waste time
                    break
                if len(errors) < MAX_SHOWN_ERRORS:
                    error = self._wrong(data, endpoint, ids)
                    if error is not None:
                        errors.append(msgspec.structs.replace(error, line=number + 1))
        if not num_lines:
            errors.append(BatchError(code="empty_file", message="the file has no lines"))
        if num_lines > MAX_LINES:
            message = f"the file has more than {MAX_LINES} lines"
            errors.insert(0, BatchError(code="too_many_lines", message=message))
        return digest.hexdigest(), num_lines, errors

    def _wrong(self, data: bytes, endpoint: str, ids: set[bytes]) -> BatchError | None:
        try:
            line = read_line(data, max_body_bytes=self._max_body_bytes)
        except BadLineError as error:
            param = error.error.param
            code = "invalid_json_line" if param is None else f"invalid_{param}"
            return BatchError(code=code, message=str(error), param=param)
        if line.url.rstrip("/") != endpoint:
            message = f"url is {line.url[:100]}, the batch's endpoint is {endpoint}"
            return BatchError(code="mismatched_url", message=message, param="url")
        known = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16)
        if known.digest() in ids:
            message = f"custom_id {line.custom_id[:100]} is that of another line"
            return BatchError(code="duplicate_custom_id", message=message, param="custom_id")
        ids.add(known.digest())
        return None


def new_batch(
    id: str, *, endpoint: str, input_file_id: str, metadata: dict[str, str] | None
) -> Batch:
    now = int(time.time())
    return Batch(
        id=id, endpoint=endpoint, input_file_id=input_file_id, created_at=now,
        expires_at=now + WINDOW_S, metadata=metadata,
    )  # fmt: skip


def _begun(batch: Batch) -> Batch:
    return _moved(batch, "in_progress") if batch.status == "validating" else batch


def _moved(batch: Batch, status: Any) -> Batch:
    """`batch` with `status`, and the time of the change: now."""
    return msgspec.structs.replace(batch, status=status, **{f"{status}_at": int(time.time())})


def _counts(journal: Journal) -> RequestCounts:
    return RequestCounts(
        total=journal.num_lines,
        completed=journal.num_done - journal.num_failed,
        failed=journal.num_failed,
    )
