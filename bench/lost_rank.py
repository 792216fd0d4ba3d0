"""A rank is killed under 64 streams, again and again: how soon all of them know, and who is left.

    python -m bench.lost_rank --times 20 -- --device cpu --tensor-parallel-size 2

What follows "--" is the server's. Each time it starts anew, and one of its followers is sent
SIGKILL at a random moment; with --hang SIGSTOP, after which it neither works nor ends. Every stream
has to end with an error that names the rank, the server with exit code 1, and no process may be
left.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.report import format_table
from bench.server_process import ServerProcess, running_server

READY_S = 300.0
END_S = 30.0
MAX_SEEN_S = 1.0  # until the last stream has ended
FOLLOWER = b"tensor_parallel.follower"


def followers_of(pid: int) -> list[int]:
    """Process ids of the ranks that follow the server `pid`."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    ids = [int(word) for path in children for word in path.read_text().split()]
    return [it for it in sorted(ids) if FOLLOWER in Path(f"/proc/{it}/cmdline").read_bytes()]


def stream(port: int, number: int) -> tuple[str, float]:
    """The last frames of one stream, and when it ended."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_S)
    body = {
        "prompt": f"{number} and", "max_tokens": 3000, "ignore_eos": True, "stream": True,
        "seed": number,
    }  # fmt: skip
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    text = connection.getresponse().read().decode()
    return text[-500:], time.perf_counter()


def kill_one(
    server: ServerProcess, num_streams: int, chance: random.Random, *, is_hanging: bool = False
) -> tuple[float, str]:
    """Seconds until the last stream had ended, and what is wrong; "": nothing."""
    how = "hangs" if is_hanging else "was ended by SIGKILL"
    ids = followers_of(server.pid)
    with ThreadPoolExecutor(num_streams) as pool:
        ends = [pool.submit(stream, server.port, number) for number in range(num_streams)]
        time.sleep(chance.uniform(0.3, 2.0))
        victim = chance.randrange(len(ids))
        killed_s = time.perf_counter()
        os.kill(ids[victim], signal.SIGSTOP if is_hanging else signal.SIGKILL)
        seen_s, wrong = 0.0, ""
        for end in ends:
            text, ended_s = end.result(END_S)
            seen_s = max(seen_s, ended_s - killed_s)
            if f"rank {victim + 1} {how}" not in text:
                wrong = f"a stream ended with {text[-200:]!r}"
    code = server.process.wait(END_S)
    left = [it for it in ids if Path(f"/proc/{it}").exists()]
    if code != 1 or left:
        wrong = f"exit code {code}, left behind: {left}"
    if seen_s > MAX_SEEN_S:
        wrong = wrong or f"seen after {seen_s:.2f} s"
    return seen_s, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang", action="store_true", help="stop the rank in place of ending it")
    parser.add_argument("flags", nargs="*", help="of the server, after --")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    all_seen_s, ready_s, problems = [], [], []
    for _ in range(args.times):
        with running_server(args.flags) as server:
            ready_s.append(server.wait_ready(READY_S).ready_s)
            seen_s, wrong = kill_one(server, args.streams, chance, is_hanging=args.hang)
            all_seen_s.append(seen_s)
            if wrong:
                problems.append(wrong)
    rows = [["", "median", "longest"]]
    for name, seconds in (("seen, s", all_seen_s), ("ready, s", ready_s)):
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"])
    print(format_table(rows))
    for wrong in problems:
        print("FAILED", wrong)
    print(f"= lost_rank: {len(problems)} of {args.times} wrong")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
