"""What structured outputs cost a server on one GPU: without and with constraints, in turns.

    python -m bench.make_model llama-3.1-8b /tmp/llama --weights
    python -m bench.gpu_masks --model /tmp/llama

One server; each turn runs the same load of bench.gpu_serve without a constraint and with each of
some that an answer cannot end before its last token. Prints the figures of each run and the medians
of --turns, and fails where the schema costs more than --limit of the output tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_serve import READY_TIMEOUT_S, measure
from bench.mask_steps import PEOPLE
from bench.report import environment, format_table, write_json
from bench.server_process import running_server

PLAIN, SCHEMA = "no constraint", "an array of {name, age}"
BODIES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    # A comma or a brace at least for each: no answer of 256 tokens ends before.
    SCHEMA: {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "people", "schema": {**PEOPLE, "minItems": 300}},
        }
    },
    "[a-z ]{2000}": {"structured_outputs": {"regex": "[a-z ]{2000}"}},
}
MAX_MODEL_LEN = 4096
MAX_COST = 0.05


def summary(runs: dict[str, Sequence[tuple[float, float]]]) -> tuple[list[list[str]], float]:
    """Rows of a table of (output tokens a second, TPOT in ms), and what the schema costs of the
    tokens a second, by the medians.
    """
    rows = [["batch", "tok/s: median", "of each run", "TPOT ms: median", "of each run", "cost"]]
    plain = statistics.median(rate for rate, _ in runs[PLAIN])
    cost = {}
    for name, figures in runs.items():
        rates, tpots = zip(*figures, strict=True)
        cost[name] = 1 - statistics.median(rates) / plain
        rows.append([
            name, f"{statistics.median(rates):,.0f}", " ".join(f"{rate:,.0f}" for rate in rates),
            f"{statistics.median(tpots):.2f}", " ".join(f"{tpot:.2f}" for tpot in tpots),
            f"{cost[name]:.1%}",
        ])  # fmt: skip
    return rows, cost[SCHEMA]


def main(argv: list[str] | None = None) -> int:
    """0 where the schema costs no more than it may."""
    args = _parse(argv)
    load = (args.input_len, args.output_len, args.concurrency)
    flags = ["--model", str(args.model), "--max-model-len", str(MAX_MODEL_LEN), *args.flags]
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    problems: list[str] = []
    try:
        with running_server(flags) as server:
            server.wait_ready(READY_TIMEOUT_S)
            for turn in range(args.turns):
                for name in args.kinds:
                    figures = measure(server.url, load, args.out, BODIES[name])
                    rate, tpot = figures["output_tokens_per_s"], figures["tpot_s"]
                    problems += [f"{name}: {n} x {text}" for text, n in figures["errors"].items()]
                    if tpot is None:
                        raise RuntimeError(f"{name}: no answer has two tokens")
                    runs[name].append((rate, 1e3 * tpot["p50"]))
                    print(f"= turn {turn + 1}, {name}: {rate:,.0f} tok/s", flush=True)
        rows, cost = summary({name: runs[name] for name in args.kinds})
        print(f"\n{format_table(rows)}")
        if cost > args.limit:
            problems.append(f"the schema costs {cost:.1%}, more than {args.limit:.0%}")
        write_json(args.json, {"runs": runs, "environment": environment(["torch", "llguidance"])})
    except (RuntimeError, ProcessLookupError) as error:
        problems.append(str(error))
    for problem in problems:
        print(f"FAILED {problem}")
    return 1 if problems else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--turns", type=int, default=3)
    add("--kinds", nargs="+", choices=list(BODIES), default=list(BODIES))
    add("--input-len", type=int, default=128)
    add("--output-len", type=int, default=256)
    add("-c", "--concurrency", type=int, default=64)
    add("--limit", type=float, default=MAX_COST, help="fraction that the schema may cost")
    add("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder of each load's JSON")
    add("--json", type=Path, metavar="FILE")
    add("flags", nargs="*", help="after --: further flags of the server")
    args = parser.parse_args(argv)
    if not {PLAIN, SCHEMA}.issubset(args.kinds):
        parser.error(f"--kinds needs {PLAIN!r} and {SCHEMA!r}, which are compared")
    return args


if __name__ == "__main__":
    sys.exit(main())
