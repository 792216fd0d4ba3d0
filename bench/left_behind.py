"""Do responses and messages that clients leave behind take room for ever? By the thousand.

    python -m bench.left_behind                      # 100,000, with a store of 8 MB
    python -m bench.left_behind -n 5000 -c 16 --json left.json
    python -m bench.left_behind --url http://localhost:8000 --pid 1234

A seventh each: a streamed and a whole response whose client goes on the way, a response in the
background and one that streams there, both never fetched, one that is stored and not asked for
again, and a streamed and a whole message whose client goes.
Exit code 1 where bench.soak's would be: something still runs or holds KV blocks, or memory grew
after the first fifth; and where a response is still in the background or the store is over its
bound at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import numpy as np

from bench.soak import (
    MAX_CONCURRENCY,
    MIB,
    QUESTIONS,
    Tally,
    judge_soak,
    make_parser,
    metrics,
    run_soak,
)
from bench.trial import Trial, conclude, try_server
from pyserve.http_client import Endpoint

STORE_MIB = 8
NUM_REQUESTS = 100_000
TIMEOUT_S, BUSY_PAUSE_S = 120.0, 0.2
STORED_BYTES, RUNNING = "pyserve:stored_response_bytes", "pyserve:background_responses"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
# Where it is sent, fields of it, and whether its client goes before its end.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "stream, left": (RESPONSES, {"stream": True}, True),
    "whole, left": (RESPONSES, {}, True),
    "background": (RESPONSES, {"background": True}, False),
    "stream in the background, left": (RESPONSES, {"background": True, "stream": True}, True),
    "stored": (RESPONSES, {}, False),
    "streamed message, left": (MESSAGES, {"stream": True}, True),
    "whole message, left": (MESSAGES, {}, True),
}


def make_body(path: str, fields: dict[str, Any], question: str, num_tokens: int) -> dict[str, Any]:
    """A request of `path` for `num_tokens` tokens about `question`."""
    if path == MESSAGES:
        messages = [{"role": "user", "content": question}]
        return {"messages": messages, "max_tokens": num_tokens, **fields}
    return {"input": question, "max_output_tokens": num_tokens, **fields}


async def leave(
    endpoint: Endpoint, tally: Tally, rng: np.random.Generator, args: argparse.Namespace, share: int
) -> None:
    """`share` requests from `args.concurrency` slots."""
    remaining = iter(range(share))

    async def slot() -> None:
        for number in remaining:
            path, fields, is_left = list(KINDS.values())[number % len(KINDS)]
            question = str(rng.choice(QUESTIONS))
            body = make_body(path, fields, question, int(rng.integers(1, 33)))
            delay_s = float(rng.uniform(0.0, 0.05)) if is_left else None
            tally.num_sent += 1
            deadline_s = time.perf_counter() + TIMEOUT_S
            while (status := await _send(endpoint, path, body, delay_s)) == 429:
                if time.perf_counter() > deadline_s:
                    break
                await asyncio.sleep(BUSY_PAUSE_S)
            if status == 200:
                tally.num_complete += 1
            elif status is None and is_left:
                tally.num_aborted += 1
            else:
                tally.failures[f"status {status}"] += 1

    await asyncio.gather(*(slot() for _ in range(args.concurrency)))
    await _wait_background(endpoint)


async def _send(
    endpoint: Endpoint, path: str, body: dict[str, Any], delay_s: float | None
) -> int | None:
    """The status of an answer that has come whole; None: it was left before that."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        request = endpoint.encode("POST", path, body, {"Connection": "close"})
        writer.write(request)
        timeout_s = TIMEOUT_S if delay_s is None else delay_s
        reply = await asyncio.wait_for(reader.read(-1), timeout_s)
    except (asyncio.TimeoutError, ConnectionError):
        return None
    finally:
        writer.close()
    return int(reply[9:12])


async def _wait_background(endpoint: Endpoint) -> None:
    """Until none is generated any more, or for TIMEOUT_S."""
    deadline_s = time.perf_counter() + TIMEOUT_S
    while (await metrics(endpoint))[RUNNING] and time.perf_counter() < deadline_s:
        await asyncio.sleep(BUSY_PAUSE_S)


async def _run_all(trial: Trial, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    result = await run_soak(trial.endpoint, trial.pid, args, leave)
    values = await metrics(trial.endpoint)
    result |= {"stored_bytes": values[STORED_BYTES], "in_background": values[RUNNING]}
    problems = []
    if values[RUNNING]:
        problems.append(f"{values[RUNNING]:.0f} responses are still generated")
    if values[STORED_BYTES] > args.store_mib * MIB:
        problems.append(f"{values[STORED_BYTES]:.0f} bytes are stored, of {args.store_mib} MiB")
    return result, problems


def _run(trial: Trial, args: argparse.Namespace) -> int:
    result, problems = asyncio.run(_run_all(trial, args))
    problems += judge_soak(result, args)
    more = f"; {result['stored_bytes'] / MIB:.2f} MiB stored of {args.store_mib}"
    return conclude(args, "left behind", problems, good="nothing is held", more=more, result=result)


def main(argv: list[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    parser = make_parser(__doc__)
    parser.set_defaults(num_requests=NUM_REQUESTS)
    parser.add_argument("--store-mib", type=int, default=STORE_MIB, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.concurrency <= MAX_CONCURRENCY:
        parser.error(f"--concurrency must be in [1, {MAX_CONCURRENCY}], got {args.concurrency}")
    return try_server(
        args, lambda trial: _run(trial, args), ["--response-store-size", f"{args.store_mib}M"]
    )


if __name__ == "__main__":
    sys.exit(main())
