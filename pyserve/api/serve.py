"""run_server: the life of the server: listen, load, ready, drain or fail, exit.

The port is open before anything is loaded. Loading runs on a thread of its own, so that /health
answers all the time. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

from pyserve import INTERRUPTED, log
from pyserve.api.app import build_app
from pyserve.api.http.connections import Connections
from pyserve.api.http.http_protocol import LAST_FRAMES_S, Serving, listening
from pyserve.api.http.inner import InnerClient
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

LOADER_GRACE_S = 1.0  # for the loading thread to stop a compiler and remove incomplete files

__all__ = ["Loaded", "Ready", "Report", "Work", "run_server"]


class Ready(NamedTuple):
    """What a Work gets when the server is ready.

    loaded  the model.
    ask     makes a client with which the server sends requests to itself, for a given user.
    """

    loaded: Loaded
    ask: Callable[[str], InnerClient]


Work = Callable[[Ready], Awaitable[int]]


def run_server(
    config: ServerConfig, load: Callable[[Report], Loaded], work: Work | None = None, *,
    is_listening: bool = True,
) -> int:  # fmt: skip
    """Serve until SIGTERM or SIGINT, or until the engine gives up; returns the exit code.

    load          runs on a thread of its own once the port is open. May raise StartupError, for
                  which the exit code is 1.
    work          runs once the server is ready. When it returns, the server ends with its exit
                  code. If a signal stops the server before, it is cancelled, and the exit code is
                  128 + the number of the signal.
    is_listening  False: there is no port; the server only gets its own requests, those of `work`.

    If the server is told to stop while it is starting, the exit code is 130 for SIGINT and 0 for
    other signals; then the process exits without waiting for the loading thread. If the engine has
    given up, the exit code is 1 and the process exits without freeing what the engine holds.
    """
    with StopSignals() as signals, ExitStack() as stack:
        try:
            ready_file = ReadyFile(config.ready_file)
            listener = None
            if is_listening:
                listener = stack.enter_context(listening_socket(config))
            stack.callback(ready_file.remove)
            server = _Server(
                config, load, listener, ready_file=ready_file, signals=signals, work=work
            )
        except StartupError as error:
            get_logger().error("%s", error)
            return 1
        code = asyncio.run(server.run())
        stack.close()
        if server.must_exit:
            server.end_loading()
            # A normal exit of the interpreter would wait for or crash in a thread inside a compiler
            # or torch, or when it frees memory of a GPU that is lost.
            log.flush()
            os._exit(code)
    return code


class _Server:
    """One run of the server, from the open port to the exit code.

    must_exit  the process must end by os._exit: it was told to stop while loading, or the engine
               has given up, and what they hold cannot be freed.
    """

    def __init__(
        self, config: ServerConfig, load: Callable[[Report], Loaded], listener: Listener | None, *,
        ready_file: ReadyFile, signals: StopSignals, work: Work | None = None,
    ) -> None:  # fmt: skip
        self._config = config
        self._load = load
        self._listener = listener
        self._ready_file = ready_file
        self._signals = signals
        self._work = work
        self._state = ServerState(config, Metrics(config.served_model_names[0]))
        self._state.open_batches()
        self._stop = asyncio.Event()
        self._loader = threading.Thread(target=self._run_load, name="pyserve-load", daemon=True)
        self._loading: asyncio.Future[Loaded] | None = None
        self._statistics: asyncio.Task[None] | None = None  # ends with the loop
        self.must_exit = False

    def end_loading(self) -> None:
        """Have the loading thread stop, and give it LOADER_GRACE_S for that."""
        self._state.startup.give_up()
        if self._loader.is_alive():
            self._loader.join(LOADER_GRACE_S)

    async def run(self) -> int:
        self._signals.watch(self._on_told)
        self._state.watchdog.start()
        try:
            listener = self._listener
            sock, tls = (None, None) if listener is None else (listener.sock, listener.tls)
            async with listening(build_app(self._state), sock, tls=tls) as serving:
                return await self._live(serving)
        finally:
            self._state.watchdog.stop()
            self._state.close()
            self._signals.forget()

    async def _live(self, serving: Serving) -> int:
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
            url = "no port, for its work alone" if self._listener is None else self._listener.url
            self._ready_file.write(url=url, model=state.model_name)
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
            url,
            state.model_name,
            state.startup.elapsed_s,
        )
        if self._config.log_stats:
            self._statistics = asyncio.create_task(log_statistics(loaded.engine, state.metrics))
        ready = Ready(loaded, partial(InnerClient, serving.make_protocol))
        if state.batches is not None:
            state.batches.start(loaded.engine, ready.ask)
        working = asyncio.ensure_future(self._work(ready)) if self._work else None
        failure = await self._wait_told_or_failed(loaded.engine, working)
        if state.batches is not None:
            await state.batches.stop()
        code = await self._end_work(working)
        if failure is not None:
            await self._fail(loaded.engine, failure)
            return 1
        is_clean = await self._drain(loaded.engine, serving.connections)
        return code if is_clean and loaded.engine.stats().error is None else 1

    async def _end_work(self, working: asyncio.Task[int] | None) -> int:
        """Cancel the work if it still runs; returns the exit code that results from it."""
        if working is None:
            return 0
        working.cancel()
        await asyncio.wait([working])
        if working.cancelled():
            return 0 if self._signals.first is None else 128 + self._signals.first
        error = working.exception()
        if error is not None:
            get_logger().error("the work failed unexpectedly", exc_info=error)
            return 1
        return working.result()

    async def _wait_loaded(self) -> Loaded | None:
        """What `load` returned, or None where the server was told to stop before that.

        Raises what `load` raised.
        """
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
            await asyncio.wait([progress])  # it erases its bar when it ends
        if self._stop.is_set():
            self._loading.cancel()
            return None
        return self._loading.result()

    async def _wait_told_or_failed(
        self, engine: EngineClient, working: asyncio.Task[int] | None
    ) -> str | None:
        """Wait until the server is told to stop, its work is done, or the engine has given up.

        Returns why the engine has given up, or None.
        """
        stop = asyncio.create_task(self._stop.wait())
        failure = asyncio.create_task(engine.wait_stopped())
        try:
            first: set[asyncio.Future[Any]] = {stop, failure, *([working] if working else [])}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            failure.cancel()
        return failure.result() if failure.done() else None

    def _run_load(self) -> None:
        """The loading thread: call `load` and hand its result or exception to the event loop."""
        loading = self._loading
        assert loading is not None
        loop = loading.get_loop()
        try:
            loaded = self._load(self._state.startup.report)
        except BaseException as error:  # whatever ends this thread must end the start-up
            # A panic of a library in Rust is not an Exception, which the event loop would not
            # handle as a failed start-up; so it is wrapped.
            failure = RuntimeError(repr(error)) if is_panic(error) else error
            finish = partial(_settle, loading, error=failure)
        else:
            # Everything loaded so far stays, so the garbage collector need not look at it again.
            gc.collect()
            gc.freeze()
            finish = partial(_settle, loading, loaded)
        with suppress(RuntimeError):  # the loop has ended, so nobody waits for the result
            loop.call_soon_threadsafe(finish)

    def _on_told(self) -> None:
        self._stop.set()
        self._ready_file.remove()

    async def _fail(self, engine: EngineClient, error: str) -> None:
        """End after the engine has given up, which has failed all that ran.

        Clients get LAST_FRAMES_S to read their errors, and the engine as long to stop.
        """
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
        """Let running requests finish, for up to shutdown_timeout_s, then stop the engine.

        Returns False where the engine does not stop cleanly.
        """
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
    """On the event loop: give the loading thread's result to the future that waits for it."""
    if loading.cancelled():
        return
    if loaded is not None:
        loading.set_result(loaded)
    elif error is not None:
        loading.set_exception(error)


def _is_clean(stopping: asyncio.Task[None]) -> bool:
    """Whether the engine stopped without an exception; else that is logged with its traceback."""
    error = stopping.exception()
    if error is not None:
        get_logger().error("the engine did not stop cleanly", exc_info=error)
    return error is None
