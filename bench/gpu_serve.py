"""An 8B model served on one GPU, beside vLLM's figures and the floors of an H200.

    python -m bench.make_model llama-3.1-8b /tmp/llama --weights
    python -m bench.gpu_serve --model /tmp/llama

Of gemma-2-9b shapes, beside their floors: what an H200 needs to read their weights and keys at the
rate at which it does the 8B's.

One server, then each load by `bench.serve` in processes of its own: random token ids as prompts to
/v1/completions, streamed, ignore_eos, temperature 0, closed loop, 2 requests a slot and at least 3.
Prints the rows of a Markdown table.

`--beside` prints the longest gap in the streams twice: of all frames, and of those that brought one
token. A token that ends amid a character is held back and comes with the next one, so that its
reader waits for two steps. Of random models, one token in a thousand is such: the longest gap of
all is then two steps, while that of one token is nearly the longest step.

The figures of vLLM (0.24.0, Llama-3.1-8B shapes in bfloat16, random weights, the same loads and
limits) and the floors were measured on one H200 on 2026-11-22.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import environment, write_json
from bench.server_process import memory_of, running_server

READY_TIMEOUT_S = 120
LOAD_TIMEOUT_S = 110
VOCAB_SIZE = 128000  # below the special tokens
NUM_SPECIAL = 256  # at most, the last of a smaller vocabulary
MAX_MODEL_LEN = 16384  # as vLLM was given


Load = tuple[int, int, int]  # tokens in, out, and requests at once


@dataclass(frozen=True)
class Peer:
    """What vLLM shows under a load, and the least a step or the most throughput can be here."""

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    floor: str


PEERS: dict[Load, Peer] = {
    (128, 512, 1): Peer(204.8, 13.1, 4.86, "TPOT 3.57 ms"),
    (128, 512, 8): Peer(1574, 48, 5.01, "TPOT 3.7 ms"),
    (128, 512, 64): Peer(9428, 225, 6.34, "TPOT 4.3 ms"),
    (128, 512, 256): Peer(15729, 665, 14.87, "27,000 tok/s"),
    (1024, 256, 32): Peer(3417, 576, 7.03, "4,900 tok/s"),
    (1024, 256, 256): Peer(5823, 3460, 30.71, "7,480 tok/s"),
}
# Of gemma-2-9b: 18.5 GB of weights, 344 KB of keys and values a token, at the rate of those above.
GEMMA2_FLOORS = {
    (128, 512, 1): "TPOT 4.4 ms; at the rate of the 8B 4.7, asked 5.15",
    (128, 512, 8): "TPOT 4.7 ms",
    (128, 512, 64): "TPOT 6.4 ms",
}
DEFAULT_LOADS = ((128, 512, 1), (128, 512, 64), (1024, 256, 256))
HEADER = (
    "| in/out, concurrency | tok/s | TTFT p50 ms | TPOT p50 ms | vLLM tok/s, TTFT, TPOT | floor |\n"
    "|---|---|---|---|---|---|"
)


def measure(
    url: str, load: Load, out: Path, body: dict[str, Any] | None = None,
    extra: Sequence[str] = (), vocab_size: int = VOCAB_SIZE,
) -> dict[str, Any]:  # fmt: skip
    """bench.serve's figures, with the fields of `body` in each request and the flags `extra`.
    Prompts are of ids below vocab_size. RuntimeError with its last words where it ends badly.
    """
    input_len, output_len, concurrency = load
    path = out / f"serve-{input_len}-{output_len}-{concurrency}.json"
    command = [
        sys.executable, "-m", "bench.serve", "--url", url, "--vocab-size", str(vocab_size),
        "--input-len", str(input_len), "--output-len", str(output_len), "-c", str(concurrency),
        "--json", str(path), "--extra-body", json.dumps(body or {}), *extra,
    ]  # fmt: skip
    path.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not ended after {LOAD_TIMEOUT_S} s") from None
    print(done.stdout, flush=True)
    if not path.exists():
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"exit code {done.returncode}: {''.join(tail)}")
    figures: dict[str, Any] = json.loads(path.read_text())["result"]
    return figures


def measure_beside(
    url: str, load: Load, beside: Load, out: Path, *, vocab_size: int
) -> dict[str, Any]:
    """One request a slot of `load`, while beside[2] prompts of beside[0] tokens pass one after
    another; the figures of both. The server counts the tokens of each frame of the load."""
    input_len, output_len, num_requests = beside
    flags = ["-n", str(load[2]), "--continuous-usage"]
    with ThreadPoolExecutor(2) as threads:
        main = threads.submit(measure, url, load, out, None, flags, vocab_size)
        one, extra = (input_len, output_len, 1), ["-n", str(num_requests)]
        other = threads.submit(measure, url, one, out, None, extra, vocab_size)
        return main.result() | {"beside": other.result()}


def vocab_size_of(config: dict[str, Any]) -> int:
    """Ids of a config.json's model that a prompt may have."""
    return int(min(VOCAB_SIZE, config.get("vocab_size", 2**20) - NUM_SPECIAL))


def config_of(model: Path) -> dict[str, Any]:
    """Its config.json; nothing where there is none, which the server will say."""
    path = model / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table_row(load: Load, figures: dict[str, Any], model_type: str) -> str:
    """One row under HEADER."""
    is_gemma2 = model_type == "gemma2"
    peer = None if is_gemma2 else PEERS.get(load)
    floor = GEMMA2_FLOORS.get(load, "") if is_gemma2 else peer.floor if peer else ""
    cells = [
        f"{load[0]}/{load[1]}, {load[2]}",
        f"{figures['output_tokens_per_s']:,.0f}",
        _ms(figures["ttft_s"]),
        _ms(figures["tpot_s"]),
        f"{peer.tokens_per_s:,.0f}, {peer.ttft_ms:g}, {peer.tpot_ms:g}" if peer else "",
        floor,
    ]
    return f"| {' | '.join(cells)} |"


def _ms(summary: dict[str, float] | None, which: str = "p50") -> str:
    if summary is None:
        return "-"
    value = summary[which] * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main(argv: list[str] | None = None) -> int:
    """0 where every load has run without an error."""
    args = _parse(argv)
    config = config_of(args.model)
    max_model_len = min(MAX_MODEL_LEN, config.get("max_position_embeddings", MAX_MODEL_LEN))
    flags = ["--model", str(args.model), "--max-model-len", str(max_model_len), *args.flags]
    results: dict[str, Any] = {}
    rows: list[str] = []
    problems: list[str] = []
    try:
        with running_server(flags) as server:
            times = server.wait_ready(READY_TIMEOUT_S)
            print(f"= server ready after {times.ready_s:.1f} s: {_phases(times.phases)}")
            for load in args.loads:
                name = "/".join(map(str, load[:2])) + f", {load[2]}"
                try:
                    vocab_size = vocab_size_of(config)
                    if args.beside:
                        figures = measure_beside(
                            server.url, load, args.beside, args.out, vocab_size=vocab_size
                        )
                        print(f"= {_beside_line(args.beside, figures)}")
                    else:
                        figures = measure(server.url, load, args.out, vocab_size=vocab_size)
                except RuntimeError as error:
                    problems.append(f"{name}: {error}")
                    continue
                results[name] = figures
                rows.append(table_row(load, figures, config.get("model_type", "")))
                print(f"= {rows[-1]}", flush=True)
                problems += [f"{name}: {n} x {text}" for text, n in figures["errors"].items()]
            memory = memory_of(server.pid)
            print(
                f"= host memory of the server: {memory.rss_bytes / 2**30:.2f} GiB, at most "
                f"{memory.peak_bytes / 2**30:.2f}, anonymous {memory.anonymous_bytes / 2**30:.2f}"
            )
            print("\n".join(["", "the server's log:", *server.log.read_text().splitlines()[:60]]))
    except (RuntimeError, ProcessLookupError) as error:
        problems.append(str(error))
    print("\n".join(["", HEADER, *rows]))
    for problem in problems:
        print(f"FAILED {problem}")
    write_json(args.json, {"results": results, "environment": environment(["torch"])})
    return 1 if problems else 0


def _beside_line(beside: Load, figures: dict[str, Any]) -> str:
    line = (
        f"beside {beside[2]} prompts of {beside[0]}, whose TTFT is "
        f"{_ms(figures['beside']['ttft_s'])} ms: longest gap {_ms(figures['itl_s'], 'max')} ms"
    )
    count = figures["longest_gap_tokens"]
    if count is None:
        return line
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return f"{line} (a frame of {tokens}), of one token {_ms(figures['one_token_itl_s'], 'max')} ms"


def _phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} at {seconds:.1f} s" for name, seconds in phases.items())


def parse_load(text: str) -> Load:
    """IN/OUTxCONCURRENCY; for argparse."""
    lengths, _, concurrency = text.partition("x")
    input_len, _, output_len = lengths.partition("/")
    try:
        return int(input_len), int(output_len), int(concurrency)
    except ValueError:
        raise argparse.ArgumentTypeError(f"want IN/OUTxCONCURRENCY, got {text}") from None


def add_places(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    """Where a program that makes its models has them and leaves its figures; the servers' flags."""
    temporary = Path(tempfile.gettempdir())
    add = parser.add_argument
    add("--folder", type=Path, default=temporary, help="where the models' folders are made")
    add("--out", type=Path, default=temporary, help="folder of each load's JSON")
    add("--json", type=Path, metavar="FILE")
    add("flags", nargs="*", default=[*flags],
        help="after --: flags of the servers (default: %(default)s)")  # fmt: skip


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--loads", nargs="+", type=parse_load, default=[*DEFAULT_LOADS], metavar="IN/OUTxC")
    add("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder of each load's JSON")
    add("--json", type=Path, metavar="FILE")
    add("--beside", type=parse_load, metavar="IN/OUTxN", help="so many requests, one after "
        "another, beside each load, of which one request a slot is sent; prints the longest gap of "
        "its streams twice, see above")  # fmt: skip
    add("flags", nargs="*", help="after --: further flags of the server")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
