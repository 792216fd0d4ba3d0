"""`pyserve run-batch`: answers a file of requests, with a server that has no port.

The answers are kept in OUTPUT.partial (batches/journal.py) and copied to OUTPUT, in the order of
the input, when all are there. After a kill or a stop, the same command continues where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyserve.api.batches.journal import Journal, JournalError, open_input
from pyserve.api.batches.lines import READ_BYTES, lines_of, max_line_bytes
from pyserve.api.batches.work import BatchWork, EngineStoppedError
from pyserve.api.life.progress import Shown, show
from pyserve.api.serve import Loaded, Ready, Report, run_server
from pyserve.config import BatchConfig, ServerConfig
from pyserve.errors import ConfigError
from pyserve.log import get_logger
from pyserve.words import counted

LINES_FAILED = 3  # exit code where every line has an answer and some answers are errors


@dataclass(frozen=True, slots=True)
class _Input:
    """The SHA-256 of the input file, and its number of lines that are not blank."""

    digest: str
    num_lines: int


def run_batch(batch: BatchConfig, config: ServerConfig, load: Callable[[Report], Loaded]) -> int:
    """Answer every line of the input; returns the exit code.

    0: all lines are answered; 3: some of the answers are errors; 1: some lines have no answer yet,
    and the same command continues with them. If told to stop, the code is run_server's. Raises
    ConfigError.
    """
    partial_path = _check_paths(batch)
    get_logger().info("run-batch: %s -> %s", batch.input_file, batch.output_file)
    found: list[_Input | Exception] = []
    reading = threading.Thread(
        target=_look_through, args=(batch.input_file, config, found), daemon=True
    )
    reading.start()

    async def work(ready: Ready) -> int:
        while reading.is_alive():
            await asyncio.sleep(0.05)
        try:
            if isinstance(found[0], Exception):
                raise found[0]
            return await _run(batch, config, ready, found[0], partial_path)
        except (JournalError, EngineStoppedError) as error:
            get_logger().error("run-batch: %s", error)
            return 1

    return run_server(config, load, work, is_listening=batch.enable_metrics)


async def _run(
    batch: BatchConfig, config: ServerConfig, ready: Ready, found: _Input, partial_path: Path
) -> int:
    journal = await asyncio.to_thread(
        Journal, partial_path, input_digest=found.digest, num_lines=found.num_lines
    )
    try:
        with open_input(batch.input_file) as file:
            await _answer(batch, config, ready, journal, partial(BatchWork, journal, file))
        await asyncio.to_thread(journal.copy, batch.output_file)
        journal.remove()
        what = f"{counted(journal.num_done, 'line')} in {batch.output_file}"
        get_logger().info("run-batch: %s, %d failed", what, journal.num_failed)
        return LINES_FAILED if journal.num_failed else 0
    except (JournalError, EngineStoppedError, asyncio.CancelledError):
        get_logger().warning(
            "run-batch: %d of %s answered, kept in %s: the same command goes on with the rest",
            journal.num_done,
            counted(found.num_lines, "line"),
            partial_path,
        )
        raise
    finally:
        journal.close()


async def _answer(
    batch: BatchConfig, config: ServerConfig, ready: Ready, journal: Journal,
    make_work: Callable[..., BatchWork],
) -> None:  # fmt: skip
    """Answer the lines that have no answer yet, and show the progress meanwhile."""
    engine, total, num_before = ready.loaded.engine, journal.num_lines, journal.num_done
    num_left = total - num_before
    get_logger().info("run-batch: %s to answer, %d answered before", counted(num_left, "line"),
                      num_before)  # fmt: skip
    began_s, tokens = time.monotonic(), engine.stats().output_tokens

    def look(now_s: float) -> Shown:
        seconds = max(now_s - began_s, 1e-3)
        num_new = journal.num_done - num_before
        rate = (engine.stats().output_tokens - tokens) / seconds
        words = f"{journal.num_done:,} of {counted(total, 'line')}, {journal.num_failed:,} failed"
        words += f", {rate:,.0f} tokens/s"
        if num_new:
            words += f", {(total - journal.num_done) * seconds / num_new:.0f} s left"
        return Shown(journal.num_done / total if total else 1.0, words)

    work = make_work(
        partial(ready.ask, ""),
        engine=engine,
        max_inflight=min(batch.max_inflight or default_inflight(ready.loaded), max(num_left, 1)),
        max_body_bytes=config.max_body_bytes,
    )
    showing = asyncio.ensure_future(show(look))
    try:
        await work.run()
    finally:
        showing.cancel()
        await asyncio.wait([showing])


def default_inflight(loaded: Loaded) -> int:
    """How many lines to keep in flight by default: max_num_seqs and a quarter more.

    The extra ones wait in the engine's queue, so that a sequence that ends is replaced at once.
    """
    num_slots = loaded.engine.info.max_num_seqs
    return num_slots + max(4, num_slots // 4)


def _look_through(path: Path, config: ServerConfig, found: list[_Input | Exception]) -> None:
    """On a thread of its own: append the file's _Input to `found`, or the exception that it met."""
    try:
        with open_input(path) as file:
            digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
            while data := file.read(READ_BYTES):
                digest.update(data)
            file.seek(0)
            max_bytes = max_line_bytes(config.max_body_bytes)
            num_lines = sum(1 for _ in lines_of(file, max_bytes=max_bytes))
            found.append(_Input(digest.hexdigest(), num_lines))
    except Exception as error:
        found.append(error)


def _check_paths(batch: BatchConfig) -> Path:
    """The path of the journal. Raises ConfigError where a path cannot work."""
    for flag, path in (("-i", batch.input_file), ("-o", batch.output_file)):
        if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
            raise ConfigError(f"{flag} {path}: addresses are not read or written yet, give a file")
    if not os.path.isfile(batch.input_file):
        raise ConfigError(f"-i {batch.input_file} is not a file")
    folder = batch.output_tmp_dir or batch.output_file.absolute().parent
    if not os.path.isdir(batch.output_file.absolute().parent) or os.path.isdir(batch.output_file):
        raise ConfigError(f"-o {batch.output_file} must be a file in a folder that exists")
    if not os.path.isdir(folder):
        raise ConfigError(f"--output-tmp-dir {folder} is not a folder")
    for folder_used in {folder, batch.output_file.absolute().parent}:
        if not os.access(folder_used, os.W_OK | os.X_OK):
            raise ConfigError(f"{folder_used} may not be written")
    return Path(folder) / f"{batch.output_file.name}.partial"
