"""What adapters cost a server on one GPU: `python -m bench.gpu_adapters --folder /tmp/models`.

Llama-3.1-8B's shapes with random weights and eight adapters of rank 16 on all matrices of the
layers, made here. Three servers: without adapters, with eight of them loaded, and with one on a
base of 4 bits. Each figure is beside that of the same load without: the median of TPOT, of a long
prompt that of TTFT. What the two ops alone take: bench.gpu_lora.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import gpu_serve
from bench.gpu_serve import Load
from bench.make_model import make_model
from bench.report import environment, write_json
from bench.server_process import running_server
from pyserve.model.adapter_config import CONFIG_FILE
from pyserve.model.adapter_weights import WEIGHTS_FILE
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import META, Placement

PRESET, RANK, NUM_ADAPTERS = "llama-3.1-8b", 16, 8
NAMES = [f"a{number}" for number in range(NUM_ADAPTERS)]
ONE_USER, MANY_USERS, LONG_PROMPT = (128, 256, 1), (128, 256, 64), (8192, 16, 1)
NUM_REQUESTS = {ONE_USER: 3, MANY_USERS: 128, LONG_PROMPT: 6}


@dataclass(frozen=True)
class Question:
    """How many percent more does a load take whose requests have one of the adapters `names`?"""

    text: str
    load: Load
    names: tuple[str, ...]
    limit_percent: float


QUESTIONS = [
    Question("none used, 1 user", ONE_USER, (), 1.0),
    Question("none used, 64 users", MANY_USERS, (), 1.0),
    Question("one, 1 user", ONE_USER, ("a0",), 8.0),
    Question("eight at random, 64 users", MANY_USERS, tuple(NAMES), 20.0),
    Question("one, prompts of 8192", LONG_PROMPT, ("a0",), 6.0),
]
ON_AWQ = Question("one on 4 bits, 1 user", ONE_USER, ("a0",), 12.0)


def write_adapter(folder: Path, config: ModelConfig) -> Path:
    """Random numbers for every module that an adapter may have."""
    folder.mkdir(parents=True, exist_ok=True)
    placement = Placement(torch.bfloat16, META, num_adapter_slots=1, max_adapter_rank=RANK)
    targets = build_model(config, placement, max_model_len=1).adapter_targets()
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none",
             "base_model_name_or_path": PRESET}  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(about))
    tensors = {}
    for name, target in targets.items():
        for side, shape in (
            ("A", (RANK, target.in_features)), ("B", (target.out_features, RANK))
        ):  # fmt: skip
            noise = torch.randn(shape, dtype=torch.bfloat16) / math.sqrt(target.in_features)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = noise
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


class Runs:
    """The servers of one run, and what they have shown."""

    def __init__(self, folder: Path, out: Path, flags: list[str]) -> None:
        self._model, self._out, self._flags = folder / f"{PRESET}-shapes", out, flags
        self._raw = make_model(self._model, PRESET, {}, has_weights=False)
        self._adapter = write_adapter(folder / "adapter", ModelConfig.from_hf(self._raw))
        self.results: dict[str, float] = {}

    def adapter_flags(self, count: int) -> list[str]:
        """All are the same numbers, and as different to a server as any."""
        modules = [f"{name}={self._adapter}" for name in NAMES[:count]]
        sizes = ["--max-loras", str(count), "--max-lora-rank", str(RANK)]
        return ["--enable-lora", *sizes, "--lora-modules", *modules]

    @contextmanager
    def server(self, name: str, *flags: str) -> Iterator[str]:
        max_model_len = min(gpu_serve.MAX_MODEL_LEN, self._raw["max_position_embeddings"])
        own = ["--model", str(self._model), "--max-model-len", str(max_model_len)]
        with running_server([*own, *self._flags, *flags]) as server:
            times = server.wait_ready(gpu_serve.READY_TIMEOUT_S)
            print(f"= {name}: ready after {times.ready_s:.1f} s", flush=True)
            yield server.url

    def measure(self, url: str, name: str, load: Load, names: tuple[str, ...]) -> float:
        """Milliseconds. RuntimeError where a request fails."""
        extra = ["-n", str(NUM_REQUESTS[load])]
        if names:
            extra += ["--model", *names]
        vocab_size = gpu_serve.vocab_size_of(self._raw)
        figures = gpu_serve.measure(url, load, self._out, extra=extra, vocab_size=vocab_size)
        if figures["errors"]:
            raise RuntimeError(f"{name}: {figures['errors']}")
        which = "ttft_s" if load == LONG_PROMPT else "tpot_s"
        self.results[name] = 1e3 * figures[which]["p50"]
        return self.results[name]

    def answer(self, url: str, question: Question, plain_ms: float) -> None:
        ms = self.measure(url, question.text, question.load, question.names)
        percent = 100 * (ms / plain_ms - 1)
        verdict = "met" if percent <= question.limit_percent else "MISSED"
        print(
            f"= {question.text}: {ms:.2f} ms beside {plain_ms:.2f}: {percent:+.1f} % "
            f"(asked <= {question.limit_percent:g}): {verdict}",
            flush=True,
        )


def run(runs: Runs) -> None:
    """Prints a line for each question. RuntimeError where a server or a request fails."""
    plain_ms: dict[Load, float] = {}
    with runs.server("without adapters") as url:
        for load in dict.fromkeys(question.load for question in QUESTIONS):
            name = "without, {}/{} x{}".format(*load)
            plain_ms[load] = runs.measure(url, name, load, ())
    with runs.server("eight adapters", *runs.adapter_flags(NUM_ADAPTERS)) as url:
        for question in QUESTIONS:
            runs.answer(url, question, plain_ms[question.load])
    with runs.server("4 bits", "--quantization", "awq", *runs.adapter_flags(1)) as url:
        base_ms = runs.measure(url, "4 bits, none used", ON_AWQ.load, ())
        runs.answer(url, ON_AWQ, base_ms)


def main(argv: list[str] | None = None) -> int:
    """0 where nothing failed, whatever it cost."""
    args = _parse(argv)
    runs = Runs(args.folder, args.out, args.flags)
    problem: str | None = None
    try:
        run(runs)
    except RuntimeError as error:
        problem = str(error)
        print(f"FAILED {problem}")
    write_json(args.json, {"ms": runs.results, "environment": environment(["torch"])})
    return 1 if problem else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu_serve.add_places(parser, ["--device", "cuda", "--load-format", "dummy"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
