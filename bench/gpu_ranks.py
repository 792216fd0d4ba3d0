"""A model that several cards share: is it right, how fast is it, what does the death of a rank do.

    python -m bench.gpu_ranks --cards 2
    python -m bench.gpu_ranks --cards 4 --preset llama-3.3-70b --kills 20
    python -m bench.gpu_ranks --cards 4 --preset tiny --loads 32/16x4 -- --device cpu

Nothing is downloaded. Three parts, in this order:

  served  random weights of the preset's shapes on all cards: each load as bench.gpu_serve sends
          it, beside the floor of pyserve.plan; start to ready; the ledger beside what is shown.
  right   --layers of the preset, with weights in files. What all cards say of a prompt, and what
          one does, is held against float32 on the CPU: log probabilities, of which the error of
          all may be a quarter larger, as sums come in another order.
  killed  bench.lost_rank with the demo model, --kills times.

Sums over the cards alone: bench.gpu_peers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_serve
from bench.gpu_serve import Load
from bench.make_model import make_model, parse_override
from bench.report import environment, write_json
from bench.server_process import running_server
from pyserve.model.config import ModelConfig
from pyserve.plan.cards import find_card
from pyserve.plan.roofline import decode_floor, measure_model

MAX_RATIO = 1.25
PROMPT_TOKENS = 400
READY_S = 300.0
KILL_S = 40.0  # that a start and a death may take
LEDGER = re.compile(r"the ledger says .* the card shows .* \(([+-][0-9.]+)%\)")
MAX_LEDGER_PERCENT = 3.0
PARTS = ("served", "right", "killed")


def served(args: argparse.Namespace, say: list[str]) -> list[str]:
    """What is wrong; lines go to `say`."""
    folder = args.folder / f"{args.preset}-shapes"
    raw = make_model(folder, args.preset, dict(args.set), has_weights=False)
    max_model_len = min(gpu_serve.MAX_MODEL_LEN, ModelConfig.from_hf(raw).max_model_len)
    flags = [
        "--model",
        str(folder),
        "--load-format",
        "dummy",
        "--max-model-len",
        str(max_model_len),
    ]
    problems: list[str] = []
    with running_server([*flags, *_ranks(args.cards), *args.flags]) as server:
        times = server.wait_ready(READY_S)
        print(f"= {args.preset} on {args.cards}: ready after {times.ready_s:.1f} s", flush=True)
        found = LEDGER.search(Path(server.log).read_text())
        if found is not None:
            is_near = abs(float(found[1])) <= MAX_LEDGER_PERCENT
            print(f"= {found[0]}, asked {MAX_LEDGER_PERCENT:g}: {'met' if is_near else 'MISSED'}")
        for load in args.loads:
            vocab_size = gpu_serve.vocab_size_of(raw)
            figures = gpu_serve.measure(server.url, load, args.out, vocab_size=vocab_size)
            print(f"= {load_line(load, figures, floor_ms_of(raw, load, args.cards))}", flush=True)
            problems += [f"{load}: {count} x {text}" for text, count in figures["errors"].items()]
            say.append(json.dumps({"load": load, **figures}))
    return problems


def load_line(load: Load, figures: dict[str, Any], floor_ms: float) -> str:
    input_len, output_len, concurrency = load
    ttft_ms, tpot_ms = (1e3 * figures[name]["p50"] for name in ("ttft_s", "tpot_s"))
    return (
        f"{input_len}/{output_len} x{concurrency}: {figures['output_tokens_per_s']:,.0f} tok/s, "
        f"TTFT {ttft_ms:.1f} ms, TPOT {tpot_ms:.2f} (floor {floor_ms:.2f})"
    )


def floor_ms_of(raw: dict[str, Any], load: Load, num_cards: int) -> float:
    """Of a step that decodes, in the middle of an answer, without what cards tell each other."""
    sizes = measure_model(ModelConfig.from_hf(raw), torch.bfloat16, tp_size=num_cards)
    context_len = load[0] + load[1] // 2
    floor = decode_floor(sizes, find_card("h200"), batch=load[2], context_len=context_len)
    return 1e3 * floor.seconds


def right(args: argparse.Namespace, say: list[str]) -> list[str]:
    """As `served`."""
    folder = args.folder / f"{args.preset}-{args.layers}-layers"
    overrides = dict(args.set) | {"num_hidden_layers": args.layers}
    raw = make_model(folder, args.preset, overrides, has_weights=True)
    chance = random.Random(0)
    prompt = [chance.randrange(gpu_serve.vocab_size_of(raw)) for _ in range(PROMPT_TOKENS)]
    exact = prompt_logprobs(folder, prompt, ["--device", "cpu", "--dtype", "float32"])
    errors = [
        rms_error(prompt_logprobs(folder, prompt, [*_ranks(size), *args.flags]), exact)
        for size in (1, args.cards)
    ]
    is_right = errors[1] <= MAX_RATIO * errors[0]
    line = (
        f"{args.layers} layers, log probabilities of {PROMPT_TOKENS} tokens: error of one card "
        f"{errors[0]:.2e}, of {args.cards} {errors[1]:.2e} (at most {MAX_RATIO:g} times as much)"
    )
    print(f"= {line}: {'met' if is_right else 'MISSED'}", flush=True)
    say.append(line)
    return [] if is_right else [line]


def prompt_logprobs(folder: Path, prompt: list[int], flags: Sequence[str]) -> list[float]:
    """Of each token of the prompt but the first, by a server of its own."""
    common = ["--model", str(folder), "--max-model-len", "2048", "--served-model-name", "m"]
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1}
    with running_server([*common, *flags]) as server:
        server.wait_ready(READY_S)
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=READY_S) as response:
            choice = json.loads(response.read())["choices"][0]
    values: list[float] = choice["logprobs"]["token_logprobs"]
    return values[1 : len(prompt)]


def rms_error(values: list[float], exact: list[float]) -> float:
    pairs = list(zip(values, exact, strict=True))
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


def killed(args: argparse.Namespace, say: list[str]) -> list[str]:
    """As `served`."""
    command = [
        sys.executable, "-m", "bench.lost_rank", "--times", str(args.kills), "--",
        "--kv-cache-memory-bytes", str(2**30), *_ranks(args.cards), *args.flags,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=KILL_S * (1 + args.kills)
    )
    print(done.stdout, flush=True)
    say.append(done.stdout)
    return [] if done.returncode == 0 else [f"lost_rank: exit code {done.returncode}"]


def _ranks(num_cards: int) -> list[str]:
    return ["--tensor-parallel-size", str(num_cards)]


def main(argv: list[str] | None = None) -> int:
    """0 where nothing failed, whatever its speed."""
    args = _parse(argv)
    problems: list[str] = []
    said: dict[str, list[str]] = {name: [] for name in args.parts}
    for name in args.parts:
        part = {"served": served, "right": right, "killed": killed}[name]
        try:
            problems += part(args, said[name])
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            problems.append(f"{name}: {error}")
    for problem in problems:
        print(f"FAILED {problem}")
    write_json(args.json, {"cards": args.cards, **said, "environment": environment(["torch"])})
    return 1 if problems else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    loads = [(128, 512, 1), (128, 512, 64), (128, 512, 256)]
    add("--cards", type=int, default=2, choices=(2, 4, 8))
    add("--preset", default="llama-3.1-8b", help="of bench.make_model (default %(default)s)")
    add("--set", action="append", type=parse_override, default=[], metavar="FIELD=VALUE",
        help="of the preset's config.json")  # fmt: skip
    add("--loads", nargs="+", type=gpu_serve.parse_load, default=loads, metavar="IN/OUTxC")
    add("--layers", type=int, default=4, help="of the model whose numbers are compared")
    add("--kills", type=int, default=3)
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    gpu_serve.add_places(parser, ["--device", "cuda"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
