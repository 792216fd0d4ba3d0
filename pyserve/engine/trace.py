"""--trace: a timeline of the event loop and the device, as Chrome trace events.

The file opens in https://ui.perfetto.dev and in chrome://tracing. It is a JSON array without its
closing bracket, which both accept, so the file is valid whenever the server ends. Methods are timed
by replacing them with a wrapper (`watch`), so without --trace nothing is slower.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyserve import log
from pyserve.engine.batch import Step
from pyserve.errors import StartupError

STEPS = 0  # the track of steps on the device; a thread's track is its native id
FLUSH_EVENTS = 2_000  # events that are buffered before they are written
MAX_BYTES = 2**30  # about two hours of a busy server


class Trace:
    """Writes spans of time.perf_counter() seconds into `path`, replacing the file.

    The constructor raises StartupError if the file cannot be written. If a later write fails, or
    the file reaches MAX_BYTES, the trace logs one warning and stops; the server goes on.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w")
        except OSError as error:
            raise StartupError(f"--trace: cannot write {path}: {error.strerror}") from None
        self._lock = threading.Lock()  # worker threads write spans too
        self._num_bytes = 0
        self._lines = ["[\n"]
        self._tracks: set[int] = set()
        self._name_track(STEPS, "steps on the device")
        self._flush()

    def span(
        self, name: str, begin_s: float, end_s: float, *, track: int | None = None, **args: object
    ) -> None:
        """Add one event to the track of this thread or to `track`; viewers show its `args`."""
        if track is None:
            track = threading.get_native_id()
        with self._lock:
            if track not in self._tracks:
                self._name_track(track, threading.current_thread().name)
            times = {"ts": round(begin_s * 1e6, 1), "dur": round((end_s - begin_s) * 1e6, 1)}
            self._add({"ph": "X", "name": name, "tid": track, **times, "args": args})
            if len(self._lines) >= FLUSH_EVENTS:
                self._flush()

    def watch(self, owner: object, method: str, name: str) -> None:
        """Record each later call of owner.method as a span `name` of the thread that calls it."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.span(name, begin_s, time.perf_counter())

        setattr(owner, method, timed)

    def step(self, step: Step, duration_s: float) -> None:
        """`step` has just ended, after duration_s seconds on the device."""
        now_s = time.perf_counter()
        self.span(
            "step", now_s - duration_s, now_s, track=STEPS,
            num_tokens=step.num_tokens, num_rows=len(step.seqs),
            num_prompt_tokens=step.num_prompt_tokens,
        )  # fmt: skip

    def close(self) -> None:
        """Write what is left. Harmless when called again."""
        with self._lock:
            if not self._file.closed:
                self._flush()
                self._file.close()

    def _name_track(self, track: int, name: str) -> None:
        self._tracks.add(track)
        self._add({"ph": "M", "name": "thread_name", "tid": track, "args": {"name": name}})

    def _add(self, event: dict[str, object]) -> None:
        if not self._file.closed:
            self._lines.append(json.dumps({"pid": 1, **event}) + ",\n")

    def _flush(self) -> None:
        text = "".join(self._lines)
        self._lines.clear()
        self._num_bytes += len(text)
        try:
            if self._num_bytes > MAX_BYTES:
                raise OSError(None, f"it has reached {MAX_BYTES >> 20} MiB")
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            log.get_logger().warning("--trace: the trace ends here: %s", error.strerror)
            with suppress(OSError):  # closing fails too: it flushes what did not fit
                self._file.close()
