"""Models other than Llama-3.1-8B in bfloat16 served on one GPU, beside floors and what is asked.

    python -m bench.gpu_models --folder /tmp/models
    python -m bench.gpu_models --folder /tmp/models --only mixtral-8x7b --seconds 100

Weights are random, of the real shapes (--load-format dummy); nothing is downloaded. For each model
one server, then each load as bench.gpu_serve sends it, with a request a slot and at least 3. Floors
are pyserve.plan's: bytes that a step must read, at the rate that an H200 was seen to. A model that
--seconds leave no time for is named as not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import gpu_serve
from bench.gpu_serve import Load
from bench.make_model import make_model
from bench.report import environment, write_json
from bench.server_process import running_server
from pyserve.model.config import ModelConfig
from pyserve.model.quantization import Method
from pyserve.plan.cards import find_card
from pyserve.plan.roofline import decode_floor, measure_model

START_S = 30  # that a model needs at least, of the time left

Figure = Literal["TPOT", "TTFT"]


@dataclass(frozen=True)
class Served:
    """loads  what is asked of each, in ms at most; None where nothing is."""

    preset: str
    loads: dict[Load, tuple[Figure, float] | None]
    method: Method | None = None

    @property
    def name(self) -> str:
        return f"{self.preset} {self.method}" if self.method else self.preset


MODELS = [
    Served(
        "mixtral-8x7b",
        {
            (128, 256, 1): ("TPOT", 6.8),
            (128, 256, 8): ("TPOT", 21.0),
            (128, 256, 64): ("TPOT", 23.5),
            (1024, 16, 1): ("TTFT", 65.0),
            (8192, 16, 1): ("TTFT", 400.0),
        },
    ),
    Served("gemma-2-9b", {(128, 512, 1): ("TPOT", 5.15)}),
    Served("glm-4.7-flash", {(128, 256, 1): None, (128, 256, 8): None, (128, 256, 64): None}),
    Served("llama-3.1-8b", {(128, 512, 1): None, (128, 512, 64): None}, method="fp8"),
    Served("llama-3.2-3b", {(128, 512, 1): None, (128, 512, 64): None}),
]


def line_of(model: Served, load: Load, figures: dict[str, Any], floor_ms: float) -> str:
    """What is printed of a load."""
    input_len, output_len, concurrency = load
    ms = {name: 1e3 * figures[f"{name.lower()}_s"]["p50"] for name in ("TTFT", "TPOT")}
    line = (
        f"{model.name} {input_len}/{output_len} x{concurrency}: "
        f"{figures['output_tokens_per_s']:,.0f} tok/s, TTFT {ms['TTFT']:.1f} ms, "
        f"TPOT {ms['TPOT']:.2f} (floor {floor_ms:.2f})"
    )
    asked = model.loads[load]
    if asked is None:
        return line
    figure, limit_ms = asked
    verdict = "met" if ms[figure] <= limit_ms else "MISSED"
    return f"{line}, asked {figure} {limit_ms:g}: {verdict}"


def floor_ms_of(config: ModelConfig, load: Load) -> float:
    """Of a step that decodes, in the middle of an answer."""
    input_len, output_len, concurrency = load
    context_len = input_len + output_len // 2
    sizes = measure_model(config, torch.bfloat16)
    floor = decode_floor(sizes, find_card("h200"), batch=concurrency, context_len=context_len)
    return 1e3 * floor.seconds


def serve(
    model: Served, folder: Path, out: Path, flags: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Figures by load. RuntimeError where the server or a load ends badly."""
    raw = make_model(folder, model.preset, {}, has_weights=False)
    config = ModelConfig.from_hf(raw).quantised_as(model.method)
    max_model_len = min(gpu_serve.MAX_MODEL_LEN, config.max_model_len)
    flags = ["--model", str(folder), "--max-model-len", str(max_model_len), *flags]
    if model.method:
        flags += ["--quantization", model.method]
    results: dict[str, Any] = {}
    with running_server(flags) as server:
        times = server.wait_ready(gpu_serve.READY_TIMEOUT_S)
        say(f"= {model.name}: ready after {times.ready_s:.1f} s")
        for load in model.loads:
            extra = ["-n", str(max(3, load[2]))]
            figures = gpu_serve.measure(
                server.url, load, out, extra=extra, vocab_size=gpu_serve.vocab_size_of(raw)
            )
            text = "{}/{} x{}".format(*load)
            results[text] = figures
            say(f"= {line_of(model, load, figures, floor_ms_of(config, load))}")
            if figures["errors"]:
                raise RuntimeError(f"{text}: {figures['errors']}")
    return results


def main(argv: list[str] | None = None) -> int:
    """0 where every model was served without an error, whatever its speed."""
    args = _parse(argv)
    end_s = time.monotonic() + args.seconds
    results: dict[str, Any] = {}
    problems: list[str] = []
    for model in MODELS:
        if args.only and model.preset not in args.only:
            continue
        if time.monotonic() + START_S > end_s:
            problems.append(f"{model.name}: not run, no time left")
            continue
        try:
            folder = args.folder / f"{model.preset}-shapes"
            results[model.name] = serve(model, folder, args.out, args.flags, _say)
        except RuntimeError as error:
            problems.append(f"{model.name}: {error}")
    for problem in problems:
        print(f"FAILED {problem}")
    write_json(args.json, {"results": results, "environment": environment(["torch"])})
    return 1 if problems else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=[model.preset for model in MODELS], metavar="PRESET")
    add("--seconds", type=float, default=165.0, help="for all together (default %(default)s)")
    gpu_serve.add_places(parser, ["--device", "cuda", "--load-format", "dummy"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
