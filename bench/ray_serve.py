"""Replicas of pyserve behind one address, by Ray Serve: `pip install "ray[serve]"`, then

    python -m bench.ray_serve --replicas 2 --cards 1 --port 8000 -- --model org/name

What follows "--" is each replica's. A replica is a pyserve process of its own, on as many cards as
--cards says (0: a CPU), on whichever machine of the Ray cluster has them free. Ray starts them,
starts one again whose /health fails, and lets requests end before it stops one.

Requests with the same X-Session-Id, or else from the same API key, go to the same replica as long
as it has room, where their conversation's prompts are cached; Ray's multiplexing does that, with
the session in a model's place. Without either the replica with the shorter queue gets it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from bench.server_process import PYSERVE, free_port

SESSION = "x-session-id"
MAX_SESSIONS = 100_000  # that a replica is remembered for
READY_S = 600.0
DRAIN_S = 60.0
# Of a connection, not of a message: they are made anew on each.
HOP_HEADERS = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
LOST = b'{"error": {"message": "the replica is gone, try again", "type": "server_error"}}'
REPLICAS, DOOR = "replicas", "door"
Headers = list[tuple[str, str]]


def passed_on(headers: Sequence[tuple[str, str]]) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in HOP_HEADERS]


def session_of(headers: Headers) -> str:
    """Whose requests belong together; "": nobody says. Never a key itself."""
    given = {name.lower(): value for name, value in headers}
    word = given.get(SESSION) or given.get("authorization") or given.get("x-api-key") or ""
    return hashlib.sha256(word.encode()).hexdigest()[:24] if word else ""


class Replica:
    """One pyserve process."""

    def __init__(self, flags: Sequence[str]) -> None:
        port = free_port()
        address = ["--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen([*PYSERVE, *address, *flags])
        self._url = f"http://127.0.0.1:{port}"
        self._http: aiohttp.ClientSession | None = None
        self._is_ready = False

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica where this raises."""
        began_s = time.monotonic()
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"pyserve has ended with {self._process.returncode}")
            try:
                async with self._client().get(f"{self._url}/health") as answer:
                    self._is_ready = self._is_ready or answer.status == 200
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # it does not listen yet
            if self._is_ready or time.monotonic() - began_s > READY_S:
                raise RuntimeError("pyserve is not healthy")
            await asyncio.sleep(0.1)

    @serve.multiplexed(max_num_models_per_replica=MAX_SESSIONS)  # type: ignore[untyped-decorator]
    async def _session(self, session: str) -> str:
        """What Ray remembers of it: that it was here."""
        return session

    async def ask(
        self, method: str, path: str, headers: Headers, body: bytes
    ) -> AsyncIterator[tuple[int, Headers] | bytes]:
        """The status and headers of pyserve's answer, then its body as it comes. Who leaves ends
        it there too."""
        if session := serve.get_multiplexed_model_id():
            await self._session(session)
        if not self._is_ready:
            await self.check_health()
        asked = self._client().request(method, self._url + path, headers=headers, data=body)
        try:
            answer = await asked
        except aiohttp.ClientError:  # it has died, and Ray has not seen it yet
            yield 503, [("Content-Type", "application/json"), ("Retry-After", "1")]
            yield LOST
            return
        async with answer:
            yield answer.status, passed_on(list(answer.headers.items()))
            async for piece in answer.content.iter_any():
                yield piece

    def _client(self) -> aiohttp.ClientSession:
        if self._http is None:
            limit = aiohttp.ClientTimeout(total=None)
            self._http = aiohttp.ClientSession(timeout=limit, auto_decompress=False)
        return self._http

    def __del__(self) -> None:
        """Ray has let requests end, and drops the replica: pyserve drains what is left."""
        self._process.terminate()
        self._process.wait(DRAIN_S)


class Door:
    """Takes requests and passes them on."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        headers = passed_on(request.headers.items())
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        replicas = self._replicas.options(multiplexed_model_id=session_of(headers))
        answer = replicas.ask.remote(request.method, path, headers, await request.body())
        status, head = await answer.__anext__()
        return StreamingResponse(answer, status, dict(head))


def run(args: argparse.Namespace) -> None:
    """Start all and return once they are ready."""
    serve.start(http_options={"host": args.host, "port": args.port})
    replicas = serve.deployment(
        Replica, name=REPLICAS, num_replicas=args.replicas, max_ongoing_requests=args.max_requests,
        ray_actor_options={"num_cpus": args.cores, "num_gpus": args.cards},
        health_check_period_s=2, health_check_timeout_s=READY_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )  # fmt: skip
    door = serve.deployment(Door, name=DOOR, max_ongoing_requests=args.replicas * args.max_requests)
    serve.run(door.bind(replicas.bind(args.flags)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cards", type=float, default=1, help="of each replica; 0: a CPU")
    parser.add_argument("--cores", type=float, default=1, help="of each replica, as Ray counts")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-requests", type=int, default=1024, help="at once, of a replica")
    parser.add_argument("flags", nargs="*", help="of pyserve, after --")
    return parser.parse_args(argv)


def main() -> int:
    run(parse_args())
    print("ready; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
