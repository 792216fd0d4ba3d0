"""Does it leak while some of the clients are hostile? bench.soak, with a share of its slots theirs.

    python -m bench.hostile_soak --seconds 1200 -c 10     # two of ten send hostile requests
    python -m bench.hostile_soak --url http://localhost:8000 --pid 1234

The hostile ones send cases of bench.hostile, of FAMILIES: what the largest requests hold, chats
against the template, schemas and grammars, clients that leave or end their side. Exit code 1 where
bench.soak's would be, where an answer to a hostile request is none of ours, or where files are open
that were not before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from typing import Any

import numpy as np

from bench.fuzz import WARM_PARTS, count_files, run_case, settle, wait_files, warm_up
from bench.hostile import make_case
from bench.soak import MAX_CONCURRENCY, Tally, judge_soak, make_parser, run_soak, soak, wait_idle
from bench.trial import Trial, conclude, try_server
from pyserve.http_client import Endpoint

FAMILIES = (
    "large", "template", "gone", "ended", "abort", "silent", "field", "grammar", "structured",
)  # fmt: skip


class Hostile:
    """The hostile clients of a soak: what they have sent, and what was wrong with the answers."""

    def __init__(self, num_clients: int, pid: int | None) -> None:
        self.num_sent: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self._num_clients = num_clients
        self._pid = pid
        self._numbers = itertools.count()

    async def part(
        self,
        endpoint: Endpoint,
        tally: Tally,
        rng: np.random.Generator,
        args: argparse.Namespace,
        share: int,
    ) -> None:
        """A part of the soak by the others, hostile requests for as long beside it."""
        await warm_up(endpoint)
        over = asyncio.Event()
        clients = [
            asyncio.create_task(self._send_until(over, endpoint, args.seed))
            for _ in range(self._num_clients)
        ]
        await soak(endpoint, tally, rng, args, share)
        over.set()
        await asyncio.gather(*clients)
        await wait_idle(endpoint)
        await settle(endpoint, self._pid)

    async def _send_until(self, over: asyncio.Event, endpoint: Endpoint, seed: int) -> None:
        while not over.is_set():
            number = next(self._numbers)
            case = make_case(seed, number, FAMILIES[number % len(FAMILIES)])
            _, problem, _ = await run_case(endpoint, case)
            self.num_sent[case.family] += 1
            if problem is not None:
                self.problems[f"{case.family}: {case.name}: {problem}"] += 1


def main(argv: list[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    parser = make_parser(__doc__)
    parser.add_argument("--hostile-share", type=float, default=0.2, help="default %(default)s")
    parser.set_defaults(max_growth_mib=5.0, warm_parts=WARM_PARTS)
    args = parser.parse_args(argv)
    if not 2 <= args.concurrency <= MAX_CONCURRENCY:
        parser.error(f"--concurrency must be in [2, {MAX_CONCURRENCY}], got {args.concurrency}")
    if not 0 < args.hostile_share < 1:
        parser.error(f"--hostile-share must be in (0, 1), got {args.hostile_share}")
    if args.streams or args.num_requests < 10:
        parser.error("--streams is bench.soak's, --num-requests must be at least 10")
    return try_server(args, lambda trial: _run(trial, args))


def _run(trial: Trial, args: argparse.Namespace) -> int:
    endpoint, pid = trial.endpoint, trial.pid
    num_hostile = max(round(args.concurrency * args.hostile_share), 1)
    args.concurrency = max(args.concurrency - num_hostile, 1)
    hostile = Hostile(num_hostile, pid)
    num_files = count_files(pid)
    result: dict[str, Any] = asyncio.run(run_soak(endpoint, pid, args, hostile.part))
    num_files_after = asyncio.run(wait_files(pid, num_files))
    problems = judge_soak(result, args)
    print(f"hostile requests of {num_hostile} clients: {dict(hostile.num_sent)}")
    problems += [f"{count} hostile requests: {text}" for text, count in hostile.problems.items()]
    if num_files is not None and num_files_after is not None:
        print(f"open files: {num_files} before, {num_files_after} after")
        if num_files_after > num_files:
            problems.append(f"{num_files_after - num_files} open files more")
    more = (
        f"; {result['num_complete']:,} complete, {result['num_aborted']:,} aborted, "
        f"{sum(hostile.num_sent.values()):,} hostile in {result['wall_s']:.0f} s"
    )
    sent = dict(hostile.num_sent)
    return conclude(
        args,
        "hostile soak",
        problems,
        good="nothing leaked",
        more=more,
        result=result,
        hostile=sent,
    )


if __name__ == "__main__":
    sys.exit(main())
