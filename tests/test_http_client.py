"""The HTTP and SSE client: any split of the bytes, keep-alive, errors that are named."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bench.stub import StubConfig, running_stub
from pyserve.http_client import Connection, Endpoint, Reply, fetch, read_whole

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
FRAMES = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"a\\u00e9 b"}}]}\r\n\r\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"c"},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\n'
    b"data: [DONE]\n\n"
)


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    encoded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return encoded + b"0\r\n\r\n"


def exchange_with(serve: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> Reply:
    """One exchange with a server that reads a request and then runs `serve`."""

    async def main() -> Reply:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await serve(writer)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = await Connection.open(Endpoint("127.0.0.1", port), has_text=True)
        request = Endpoint("127.0.0.1", port).encode("GET", "/")
        reply = await connection.exchange(request, started_s=0.0, timeout_s=5)
        connection.close()
        server.close()
        await server.wait_closed()
        return reply

    return asyncio.run(main())


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.is_closed = False

    def write(self, data: object) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def abort(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("chunk_size", [1, 3, 50, 10_000])
@pytest.mark.parametrize("segment_size", [1, 2, 7, 64, 10_000])
def test_every_split_of_the_bytes_reads_the_same(chunk_size: int, segment_size: int) -> None:
    stream = HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(FRAMES, chunk_size)

    async def main() -> tuple[Reply, Connection]:
        connection = Connection(has_text=True)
        connection.connection_made(FakeTransport())
        task = asyncio.create_task(connection.exchange(b"", started_s=0.0, timeout_s=5))
        await asyncio.sleep(0)
        for i in range(0, len(stream), segment_size):
            connection.data_received(stream[i : i + segment_size])
        return await task, connection

    reply, connection = asyncio.run(main())
    assert reply.error is None and reply.is_done
    assert reply.texts == {0: "aé bc"}
    assert len(reply.chunk_times) == 2  # neither the role frame nor the usage frame
    assert reply.chunk_counts == []  # usage came at the end only
    assert reply.num_output_tokens == 5  # usage, not frames
    assert reply.finish_reasons == {0: "stop"}
    assert connection.is_usable


def test_a_body_that_ends_with_the_connection() -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + FRAMES)

    reply = exchange_with(serve)
    assert reply.error is None
    assert reply.texts == {0: "aé bc"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_tokens_so_far_at_each_frame(path: str) -> None:
    """The frame of two tokens counts both; chat's role frame and the usage frame count nothing."""
    body = {
        "prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    with running_stub(StubConfig(held_frame=1)) as (url, _):
        reply = asyncio.run(fetch(Endpoint.parse(url), path, body))
    assert reply.error is None and len(reply.chunk_times) == 4
    assert reply.chunk_counts == [1, 3, 4, 5]
    assert reply.num_output_tokens == 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "connection lost after 0 frames"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(FRAMES, 50)[:240], "lost after 1"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(FRAMES[:90], 90), "without [DONE]"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "unreadable answer"),
        (HEAD + b"\r\ndata: {broken\n\n", "unreadable answer"),
        (b"HTTP/1.1 429 Late\r\ncontent-length: 31\r\n\r\n" + b'{"error":{"message":"queue up"}}',
         "HTTP 429: queue up"),
        (HEAD + b'\r\ndata: {"error":{"message":"step failed"}}\n\ndata: [DONE]\n\n',
         "error in the stream: step failed"),
    ],
)  # fmt: skip
def test_every_failure_has_a_name(answer: bytes, message: str) -> None:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    reply = exchange_with(serve)
    assert reply.error is not None and message in reply.error


def test_a_silent_server_is_a_timeout() -> None:
    async def main() -> Reply:
        with running_stub(StubConfig(delay_s=5.0)) as (url, _):
            endpoint = Endpoint.parse(url)
            body = {"prompt": [1], "max_tokens": 2, "stream": True}
            return await fetch(endpoint, "/v1/completions", body, timeout_s=0.2)

    reply = asyncio.run(main())
    assert reply.error is not None and "no end after 0.2 s" in reply.error


def test_connections_are_kept_and_whole_bodies_read() -> None:
    async def main(url: str) -> list[Reply]:
        endpoint = Endpoint.parse(url + "/v1")
        connection = await Connection.open(endpoint)
        body = {"prompt": [1, 2], "max_tokens": 3, "n": 2}
        replies = []
        for request in (body, {**body, "stream": True}, body):
            data = endpoint.encode("POST", "/v1/completions", request)
            replies.append(await connection.exchange(data, started_s=0.0, timeout_s=5))
            assert connection.is_usable
        connection.close()
        return replies

    with running_stub() as (url, _):
        whole, streamed, again = asyncio.run(main(url))
    read_whole(whole)
    assert whole.texts[0] == whole.texts[1] != ""
    assert whole.usage is not None and whole.usage.completion_tokens == 6
    assert whole.finish_reasons == {0: "length", 1: "length"}
    assert len(streamed.chunk_times) == 6
    assert again.error is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", Endpoint("localhost", 8000)),
        ("http://h/v1/", Endpoint("h", 80)),
        ("https://h/proxy", Endpoint("h", 443, "/proxy", is_tls=True)),
    ],
)
def test_addresses(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected


@pytest.mark.parametrize(
    ("host", "shown"), [("example.com", "example.com:80"), ("::1", "[::1]:80")]
)
def test_the_host_header_names_the_address(host: str, shown: str) -> None:
    assert f"\r\nHost: {shown}\r\n".encode() in Endpoint(host, 80).encode("GET", "/")


def test_a_wrong_address_is_refused() -> None:
    with pytest.raises(ValueError, match="ftp://h"):
        Endpoint.parse("ftp://h")
