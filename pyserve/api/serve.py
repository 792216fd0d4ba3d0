"""The life of the server: listen, load, ready, drain or fail, exit.

The port is open before anything is loaded; loading runs on one thread of its own, so that /health
answers all the time. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from pyserve import INTERRUPTED, log
from pyserve.api.app import build_app
from pyserve.api.http.connections import Connections
from pyserve.api.http.http_protocol import LAST_FRAMES_S, listening
from pyserve.api.life.listen import Listener, listening_socket
from pyserve.api.life.progress import show_progress
from pyserve.api.life.ready_file import ReadyFile
from pyserve.api.life.signals import StopSignals
from pyserve.api.life.startup import Report
from pyserve.api.life.stats_log import log_statistics
from pyserve.api.state import Loaded, ServerState
from pyserve.client import EngineClient
from pyserve.config import ServerConfig
from pyserve.errors import StartupError
from pyserve.log import get_logger
from pyserve.metrics import Metrics
from pyserve.model_files import is_panic
from pyserve.words import counted

LOADER_GRACE_S = 1.0  # for a thread that loads, to end a compiler and remove half a file

__all__ = ["Loaded", "Report", "run_server"]


def run_server(config: ServerConfig, load: Callable[[Report], Loaded]) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine gives up; returns the exit code.

    `load` runs on a thread of its own once the port is open, and may raise StartupError.
    A thread that still loads when the server is told to stop ends with the process. So does all
    that an engine holds which has given up. If told to stop before it is ready, the exit code is 0
    for SIGTERM and 130 for SIGINT.
    """
    with StopSignals() as signals, ExitStack() as stack:
        try:
            ready_file = ReadyFile(config.ready_file)
            listener = stack.enter_context(listening_socket(config))
        except StartupError as error:
            get_logger().error("%s", error)
            return 1
        stack.callback(ready_file.remove)
        server = _Server(config, load, listener, ready_file=ready_file, signals=signals)
        code = asyncio.run(server.run())
        stack.close()
        if server.must_exit:
            server.end_loading()
            # The interpreter would wait for, or crash under, a thread inside a compiler or torch,
            # or memory of a GPU that is lost.
            log.flush()
            os._exit(code)
    return code


class _Server:
    """One run from the open port to the exit code."""

    def __init__(
        self, config: ServerConfig, load: Callable[[Report], Loaded], listener: Listener, *,
        ready_file: ReadyFile, signals: StopSignals,
    ) -> None:  # fmt: skip
        self._config = config
        self._load = load
        self._listener = listener
        self._ready_file = ready_file
        self._signals = signals
        self._state = ServerState(config, Metrics(config.served_model_names[0]))
        self._stop = asyncio.Event()
        self._loader = threading.Thread(target=self._run_load, name="pyserve-load", daemon=True)
        self._loading: asyncio.Future[Loaded] | None = None
        self._statistics: asyncio.Task[None] | None = None  # ends with the loop
        # Told to stop while loading, or the engine has given up: what is held cannot be freed.
        self.must_exit = False

    def end_loading(self) -> None:
        """Let a thread that loads end what it has begun, where it can do so soon."""
        self._state.startup.give_up()
        if self._loader.is_alive():
            self._loader.join(LOADER_GRACE_S)

    async def run(self) -> int:
        self._signals.watch(self._on_told)
        self._state.watchdog.start()
        try:
            async with listening(
                build_app(self._state), self._listener.sock, tls=self._listener.tls
            ) as connections:
                return await self._live(connections)
        finally:
            self._state.watchdog.stop()
            self._state.close()
            self._signals.forget()

    async def _live(self, connections: Connections) -> int:
        state = self._state
        try:
            loaded = await self._wait_loaded()
            if loaded is None:
                get_logger().info("told to stop while starting")
                self.must_exit = True
                return INTERRUPTED if self._signals.first == signal.SIGINT else 0
            loaded.engine.start()
            state.metrics.watch(loaded.engine.stats, loaded.engine.info)
            state.metrics.watch_loop(lambda: state.watchdog.recent_lag_s)
            state.loaded = loaded
            state.status = "ready"
            self._ready_file.write(url=self._listener.url, model=state.model_name)
        except StartupError as error:
            get_logger().error("%s", error)
            return 1
        except Exception:
            get_logger().exception("the start failed unexpectedly")
            return 1
        state.startup.finish()
        state.watchdog.forget()
        get_logger().info("the start took %s", state.startup.explain())
        get_logger().info(
            "pyserve is ready on %s (model %s, %.1f s)",
            self._listener.url,
            state.model_name,
            state.startup.elapsed_s,
        )
        if self._config.log_stats:
            self._statistics = asyncio.create_task(log_statistics(loaded.engine, state.metrics))
        failure = await self._wait_told_or_failed(loaded.engine)
        if failure is not None:
            await self._fail(loaded.engine, failure)
            return 1
        is_clean = await self._drain(loaded.engine, connections)
        return 0 if is_clean and loaded.engine.stats().error is None else 1

    async def _wait_loaded(self) -> Loaded | None:
        """What `load` returned, or None where the server is told to stop before."""
        loop = asyncio.get_running_loop()
        self._loading = loop.create_future()
        self._loader.start()
        stop = asyncio.create_task(self._stop.wait())
        progress = asyncio.create_task(show_progress(self._state.startup))
        try:
            first: set[asyncio.Future[Any]] = {self._loading, stop}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            progress.cancel()
            await asyncio.wait([progress])  # it has taken its bar away
        if self._stop.is_set():
            self._loading.cancel()
            return None
        return self._loading.result()

    async def _wait_told_or_failed(self, engine: EngineClient) -> str | None:
        """Until the server is told to stop, or the engine has given up: then why."""
        stop = asyncio.create_task(self._stop.wait())
        failure = asyncio.create_task(engine.wait_stopped())
        try:
            await asyncio.wait([stop, failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            failure.cancel()
        return failure.result() if failure.done() else None

    def _run_load(self) -> None:
        """On the loading thread."""
        loading = self._loading
        assert loading is not None
        loop = loading.get_loop()
        try:
            loaded = self._load(self._state.startup.report)
        except BaseException as error:  # whatever ends this thread must end the start
            # A panic of a library in Rust is no Exception; the start must still count as failed.
            failure = RuntimeError(repr(error)) if is_panic(error) else error
            finish = partial(_settle, loading, error=failure)
        else:
            # What lives from here on is never looked at again by the collector.
            gc.collect()
            gc.freeze()
            finish = partial(_settle, loading, loaded)
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(finish)

    def _on_told(self) -> None:
        self._stop.set()
        self._ready_file.remove()

    async def _fail(self, engine: EngineClient, error: str) -> None:
        """The engine has failed what ran: let clients hear of it, then let go of the rest."""
        self.must_exit = True
        self._ready_file.remove()
        state = self._state
        state.status = "failed"
        get_logger().error("%s; exiting", error)
        await state.wait_idle(LAST_FRAMES_S)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.wait([stopping], timeout=LAST_FRAMES_S)
        if stopping.done():
            _is_clean(stopping)

    async def _drain(self, engine: EngineClient, connections: Connections) -> bool:
        """Let requests end, then stop the engine; False where it does not stop cleanly."""
        state = self._state
        state.status = "draining"
        connections.close_idle()
        state.uploads.close()
        timeout_s, num_running = self._config.shutdown_timeout_s, state.num_in_flight
        if num_running:
            what = f"{counted(num_running, 'request')} {'has' if num_running == 1 else 'have'}"
            get_logger().info("shutting down: %s %.0f s to finish", what, timeout_s)
        else:
            get_logger().info("shutting down")
        if not await state.wait_idle(timeout_s):
            num_left = state.num_in_flight
            what = f"{counted(num_left, 'request')} {'is' if num_left == 1 else 'are'}"
            get_logger().warning("%s cut off", what)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.wait([stopping])
        await state.wait_idle(LAST_FRAMES_S)
        return _is_clean(stopping)


def _settle(
    loading: asyncio.Future[Loaded], loaded: Loaded | None = None, *,
    error: BaseException | None = None,
) -> None:  # fmt: skip
    """The end of the loading thread, on the loop."""
    if loading.cancelled():
        return
    if loaded is not None:
        loading.set_result(loaded)
    elif error is not None:
        loading.set_exception(error)


def _is_clean(stopping: asyncio.Task[None]) -> bool:
    """False, and a traceback in the log, where the end of the engine met a bug."""
    error = stopping.exception()
    if error is not None:
        get_logger().error("the engine did not stop cleanly", exc_info=error)
    return error is None
