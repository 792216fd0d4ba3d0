"""A server that answers like OpenAI's and computes nothing: `serve.py --self-test` and the tests.

    python -m bench.stub --port 8001

Every frame is one write, so that a client gets one small segment per frame, the most expensive
way a real server can send them. Answers depend on the prompt only.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

MODEL = "stub"
MAX_TOKENS = 2**16  # of an answer, whatever is asked for: hostile clients ask for a billion


class StubConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the stub behaves.

    tokens_per_frame  tokens that one frame holds.
    held_frame        number of the frame, from 0, that is held back and comes with the next one,
                      after their two delays; None: none.
    delay_s           between frames; 0 only yields to the other streams.
    fail_every        every k-th request is answered 500, 0: none.
    break_every       every k-th stream breaks off half way, 0: none.
    error_frame_every every k-th stream ends in an error frame, 0: none.
    spoil_every       every k-th stream says something else, 0: none.
    has_usage         False: no usage although asked for, neither at the end nor in each frame.
    short_by          tokens that every answer lacks.
    leaked_requests   what /metrics claims still runs.
    """

    tokens_per_frame: int = 1
    held_frame: int | None = None
    delay_s: float = 0.0
    fail_every: int = 0
    break_every: int = 0
    error_frame_every: int = 0
    spoil_every: int = 0
    has_usage: bool = True
    short_by: int = 0
    leaked_requests: int = 0


class Stub:
    """The handler; `seen` keeps the bodies of the last requests for tests."""

    def __init__(self, config: StubConfig) -> None:
        self.config = config
        self.seen: list[dict[str, Any]] = []
        self.num_requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One kept-alive connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split(" ", 2)
                length = 0
                for line in head.split("\r\n"):
                    if line.lower().startswith("content-length:"):
                        length = int(line.partition(":")[2])
                body = await reader.readexactly(length)
                if not await self._answer(method, path, body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away: nothing is held for it
        finally:
            writer.close()

    async def _answer(
        self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """False where the connection must close."""
        if method == "GET":
            writer.write(self._get(path))
            return True
        request = msgspec.json.decode(body)
        self.seen = [*self.seen[-63:], request]
        self.num_requests += 1
        config = self.config
        if config.fail_every and self.num_requests % config.fail_every == 0:
            error = {"error": {"message": "stub failure", "type": "InternalServerError"}}
            writer.write(_whole(error, status="500 Internal Server Error"))
            return True
        is_chat = path.endswith("/chat/completions")
        if not request.get("stream"):
            writer.write(_whole(_whole_body(request, is_chat, self.config)))
            return True
        return await self._stream(request, is_chat, writer)

    def _get(self, path: str) -> bytes:
        if path.endswith("/models"):
            return _whole({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        if path.endswith("/metrics"):
            running = self.config.leaked_requests
            text = (
                "# TYPE vllm:num_requests_running gauge\n"
                f'vllm:num_requests_running{{model_name="stub"}} {running}.0\n'
                'vllm:num_requests_waiting{model_name="stub"} 0.0\n'
                'vllm:kv_cache_usage_perc{model_name="stub"} 0.0\n'
            )
            return _whole_bytes(text.encode(), "text/plain")
        return _whole({"status": "ok", "version": "stub"})

    async def _stream(
        self, request: dict[str, Any], is_chat: bool, writer: asyncio.StreamWriter
    ) -> bool:
        config = self.config
        count = self.num_requests
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        pieces = _pieces(request, config)
        if config.spoil_every and count % config.spoil_every == 0:
            pieces[0] = " spoilt"
        num_choices = request.get("n", 1)
        options = request.get("stream_options") or {}
        wants_usage = config.has_usage and options.get("include_usage")
        num_so_far = 0
        if is_chat:
            for index in range(num_choices):
                delta = {"role": "assistant", "content": ""}
                _write_frame(writer, {"choices": [{"index": index, "delta": delta}]})
        for position, piece in enumerate(pieces):
            if position == config.held_frame:
                await asyncio.sleep(config.delay_s)
            if config.break_every and count % config.break_every == 0:
                if position == len(pieces) // 2:
                    return False
            if config.error_frame_every and count % config.error_frame_every == 0:
                if position == len(pieces) // 2:
                    _write_frame(writer, {"error": {"message": "stub stream error"}})
                    break
            reason = "length" if position == len(pieces) - 1 else None
            num_so_far += len(piece.split())
            more: dict[str, Any] = {}
            if wants_usage and options.get("continuous_usage_stats"):
                more["usage"] = {**_usage(request, config), "completion_tokens": num_so_far}
            for index in range(num_choices):
                _write_frame(writer, {"choices": [_piece(piece, index, is_chat, reason)], **more})
            await asyncio.sleep(config.delay_s)
            await writer.drain()
        if wants_usage:
            _write_frame(writer, {"choices": [], "usage": _usage(request, config)})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True


@contextmanager
def running_stub(config: StubConfig | None = None) -> Iterator[tuple[str, Stub]]:
    """A stub on a thread of this process; yields its address and the stub."""
    stub = Stub(config or StubConfig())
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(_serve_until(stub, listener, stop))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", stub
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)


@contextmanager
def running_stub_processes(count: int, config: StubConfig) -> Iterator[str]:
    """`count` processes that share one port; yields the address."""
    context = multiprocessing.get_context("spawn")
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))  # holds the port, never listens
    port = holder.getsockname()[1]
    ready = context.Semaphore(0)
    processes = [
        context.Process(target=_run_process, args=(port, config, ready), daemon=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            if not ready.acquire(timeout=60):
                raise RuntimeError("a stub process did not start within 60 s")
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in processes:
            process.terminate()
            process.join()
        holder.close()


def _run_process(
    port: int, config: StubConfig, ready: Any = None, *, host: str = "127.0.0.1"
) -> None:
    async def serve() -> None:
        server = await asyncio.start_server(
            Stub(config).serve, host, port, reuse_port=True, backlog=4096
        )
        if ready is not None:
            ready.release()
        await server.serve_forever()

    asyncio.run(serve())


async def _serve_until(stub: Stub, listener: socket.socket, stop: asyncio.Event) -> None:
    server = await asyncio.start_server(stub.serve, sock=listener, backlog=4096)
    await stop.wait()
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _num_tokens(request: dict[str, Any], config: StubConfig) -> int:
    asked = request.get("max_tokens") or request.get("max_completion_tokens") or 16
    return max(1, min(asked, MAX_TOKENS) - config.short_by)


def _pieces(request: dict[str, Any], config: StubConfig) -> list[str]:
    """The text of each frame; token i of a prompt is always the same word."""
    prompt = request.get("prompt", request.get("messages"))
    start = zlib.crc32(msgspec.json.encode(prompt)) % 1000
    words = [f" w{(start + i) % 1000}" for i in range(_num_tokens(request, config))]
    step = config.tokens_per_frame
    pieces = ["".join(words[i : i + step]) for i in range(0, len(words), step)]
    if (held := config.held_frame) is not None:
        pieces[held : held + 2] = ["".join(pieces[held : held + 2])]
    return pieces


def _piece(text: str, index: int, is_chat: bool, reason: str | None) -> dict[str, Any]:
    content = {"delta": {"content": text}} if is_chat else {"text": text}
    return {"index": index, **content, "finish_reason": reason}


def _usage(request: dict[str, Any], config: StubConfig) -> dict[str, Any]:
    prompt = request.get("prompt") or "".join(m["content"] for m in request["messages"]).split()
    return {
        "prompt_tokens": len(prompt),
        "completion_tokens": _num_tokens(request, config) * request.get("n", 1),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _whole_body(request: dict[str, Any], is_chat: bool, config: StubConfig) -> dict[str, Any]:
    text = "".join(_pieces(request, config))
    content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    choices = [
        {"index": index, **content, "finish_reason": "length"}
        for index in range(request.get("n", 1))
    ]
    return {"choices": choices, "usage": _usage(request, config)}


def _write_frame(writer: asyncio.StreamWriter, frame: dict[str, Any]) -> None:
    payload = b"data: " + msgspec.json.encode(frame) + b"\n\n"
    writer.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")


def _whole(body: dict[str, Any], status: str = "200 OK") -> bytes:
    return _whole_bytes(msgspec.json.encode(body), "application/json", status)


def _whole_bytes(payload: bytes, content_type: str, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(payload)}"
    return head.encode() + b"\r\n\r\n" + payload


def main(argv: list[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="An OpenAI server that computes nothing.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--tokens-per-frame", type=int, default=1)
    parser.add_argument("--delay-s", type=float, default=0.0, help="between frames")
    args, _ = parser.parse_known_args(argv)  # flags of a real server change nothing here
    config = StubConfig(tokens_per_frame=args.tokens_per_frame, delay_s=args.delay_s)
    _run_process(args.port, config, host=args.host)


if __name__ == "__main__":
    main()
