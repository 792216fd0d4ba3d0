"""What the benches that try a server share: which server, the flags that name it, the verdict."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.report import environment, write_json
from bench.server_process import ServerProcess, running_server
from pyserve.http_client import Endpoint

READY_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Trial:
    """The server that is tried; pid and log where they are known."""

    endpoint: Endpoint
    pid: int | None
    log: Path | None


def server_parser(description: str | None) -> argparse.ArgumentParser:
    """With --url, --pid, --json, and after -- the flags of the server."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="a running server; default: start one")
    add("--pid", type=int, help="process whose memory is watched, with --url")
    add("--json", type=Path, metavar="FILE")
    add("flags", nargs="*", help="after --: flags of the server that is started")
    return parser


def try_server(
    args: argparse.Namespace, run: Callable[[Trial], int], flags: Sequence[str] = ()
) -> int:
    """What `run` says of the server in --url, or of one that is started with the flags.

    1, with a line, where it cannot be reached.
    """
    api_key = getattr(args, "api_key", None)
    place: AbstractContextManager[ServerProcess | None] = nullcontext(None)
    if args.url is None:
        place = running_server([*flags, *args.flags], folder=Path(tempfile.gettempdir()))
    try:
        with place as server:
            if server is None:
                return run(Trial(Endpoint.parse(args.url, api_key), args.pid, None))
            server.wait_ready(READY_TIMEOUT_S)
            endpoint = Endpoint.parse(server.url, api_key)
            return run(Trial(endpoint, server.pid, server.log))
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def conclude(
    args: argparse.Namespace, name: str, problems: Sequence[str], *, good: str, more: str = "",
    max_shown: int | None = None, packages: Sequence[str] = ("pyserve", "torch"), **figures: Any,
) -> int:  # fmt: skip
    """Print the problems and the verdict, write --json; the exit code.

    good   what is said where there are no problems; `more` follows in any case.
    """
    for problem in problems[:max_shown]:
        print(f"FAILED {problem}")
    print(f"= {name}: {'FAILED' if problems else good}{more}")
    config = {name: str(value) for name, value in vars(args).items() if name != "api_key"}
    record = {"config": config, "environment": environment(packages), **figures}
    write_json(args.json, msgspec.to_builtins({**record, "problems": list(problems)}))
    return 1 if problems else 0
