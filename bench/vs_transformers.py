"""pyserve through its server against transformers' `generate`: same weights, dtype and prompts.

    python -m bench.vs_transformers --model pyserve/demo

Both get the same token ids and as many new tokens, greedy, EOS ignored, and as many threads. The
rounds of both are interleaved, so that a busy machine hits both; figures are medians. transformers
runs in this process, warmed up, in inference mode, once with its dynamic and once with its static
KV cache: the faster counts. The client runs here too and costs the server its time. Prompts are new
in every round: no prefix cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from bench.report import busy_remark, environment, format_table, write_json
from bench.server_process import PYSERVE, running_server
from pyserve.http_client import Connection, Endpoint, Reply, read_whole

DEMO_MODEL = Path(__file__).parent.parent / "pyserve" / "demo"
TARGETS = {1: 2.0, 16: 5.0}  # batch -> pyserve's tokens a second over transformers'
PAUSE_S = 0.2  # lets the other side's OpenMP threads fall asleep


@dataclass(slots=True)
class Timing:
    """Rounds of one contender at one batch size: output tokens a second and the texts."""

    tokens_per_s: list[float] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


class Generate:
    """transformers' generate on the same folder."""

    def __init__(self, model: Path, dtype: torch.dtype, tokenizer: Tokenizer) -> None:
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._tokenizer = tokenizer

    def run(self, prompts: list[list[int]], num_tokens: int, cache: str) -> tuple[float, list[str]]:
        """Seconds and texts; `cache` is "dynamic" or "static"."""
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, use_cache=True, eos_token_id=None,
            pad_token_id=0, cache_implementation=cache,
        )  # fmt: skip
        # A model's own generation_config.json would fill what is None here, EOS included.
        self._model.generation_config = config
        ids = torch.tensor(prompts)
        started_s = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(ids, attention_mask=torch.ones_like(ids))
        took_s = time.perf_counter() - started_s
        new = output[:, ids.shape[1] :].tolist()
        assert all(len(row) == num_tokens for row in new), "generate has stopped early"
        return took_s, self._tokenizer.decode_batch(new, skip_special_tokens=True)


class Server:
    """Requests to a running server, one per prompt, all at once, over kept connections."""

    def __init__(self, url: str) -> None:
        self._endpoint = Endpoint.parse(url)

    async def run(
        self, prompts: list[list[int]], num_tokens: int, *, stream: bool
    ) -> tuple[float, list[str]]:
        """Seconds from the first request sent to the last answer read, and the texts."""
        requests = []
        for prompt in prompts:
            body: dict[str, Any] = {
                "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
                "stream": stream,
            }  # fmt: skip
            if stream:
                body["stream_options"] = {"include_usage": True}
            requests.append(self._endpoint.encode("POST", "/v1/completions", body))
        connections = [await Connection.open(self._endpoint, has_text=True) for _ in prompts]
        started_s = time.perf_counter()
        replies = await asyncio.gather(
            *(
                connection.exchange(request, started_s=started_s, timeout_s=600)
                for connection, request in zip(connections, requests, strict=True)
            )
        )
        took_s = time.perf_counter() - started_s
        for connection in connections:
            connection.close()
        return took_s, [_text(reply, num_tokens, stream) for reply in replies]


def _text(reply: Reply, num_tokens: int, stream: bool) -> str:
    if not stream:
        read_whole(reply)
    if reply.error is not None:
        raise RuntimeError(f"the server: {reply.error}")
    if reply.num_output_tokens != num_tokens:
        raise RuntimeError(f"{reply.num_output_tokens} tokens came, asked for {num_tokens}")
    return reply.texts[0]


def compare(
    contenders: dict[str, Callable[[list[list[int]]], tuple[float, list[str]]]],
    prompts_of: Callable[[int], list[list[int]]],
    num_tokens: int,
    rounds: int,
) -> dict[str, Timing]:
    """Run all contenders in turn, `rounds` times after one warm-up, on the same prompts."""
    timings = {name: Timing() for name in contenders}
    for number in range(rounds + 1):
        prompts = prompts_of(number)
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            took_s, texts = run(prompts)
            if number > 0:
                timings[name].tokens_per_s.append(len(prompts) * num_tokens / took_s)
                timings[name].texts.append(texts)
    return timings


def render(batch: int, timings: dict[str, Timing]) -> tuple[str, float]:
    """The table of one batch size and pyserve's ratio to the faster of transformers' caches."""
    best = max(timing.median for name, timing in timings.items() if "transformers" in name)
    reference = next(timing for name, timing in timings.items() if "transformers" in name)
    rows = [[f"batch {batch}", "tok/s", "min", "max", "ratio", "same text"]]
    for name, timing in timings.items():
        pairs = [
            (ours, theirs)
            for our_round, their_round in zip(timing.texts, reference.texts, strict=True)
            for ours, theirs in zip(our_round, their_round, strict=True)
        ]
        same = sum(ours == theirs for ours, theirs in pairs)
        rows.append(
            [
                name,
                f"{timing.median:,.1f}",
                f"{min(timing.tokens_per_s):,.1f}",
                f"{max(timing.tokens_per_s):,.1f}",
                f"{timing.median / best:.2f}",
                f"{same}/{len(pairs)}",
            ]
        )
    ratio = timings["pyserve"].median / best
    text = format_table(rows)
    if batch in TARGETS:
        verdict = "met" if ratio >= TARGETS[batch] else "MISSED"
        text += f"\ntarget at batch {batch}: {TARGETS[batch]:g}x, reached {ratio:.2f}x: {verdict}"
    return text, ratio


def ordinary_ids(model: Path, tokenizer: Tokenizer) -> list[int]:
    """Token ids that are neither special nor beyond the model's vocabulary."""
    vocab_size = AutoConfig.from_pretrained(model).vocab_size
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [id for id in range(min(vocab_size, tokenizer.get_vocab_size())) if id not in special]


def run(args: argparse.Namespace, command: Sequence[str] = PYSERVE) -> dict[str, Any]:
    """Start the server, measure every batch size, print the tables; the figures."""
    torch.set_num_threads(args.threads)
    dtype = args.dtype or str(AutoConfig.from_pretrained(args.model).dtype).removeprefix("torch.")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = ordinary_ids(args.model, tokenizer)
    generate = Generate(args.model, getattr(torch, dtype), tokenizer)
    num_tokens = args.new_tokens
    flags = ["--model", str(args.model.resolve()), "--dtype", dtype, *args.flags]
    figures: dict[str, Any] = {"dtype": dtype, "threads": args.threads}
    print(busy_remark(), end="")
    print(
        f"{args.model.name}, {dtype}, {args.threads} threads, prompts of {args.prompt_len}, "
        f"{num_tokens} new tokens, median of {args.rounds} rounds"
    )
    environ = {"OMP_NUM_THREADS": str(args.threads)}
    with running_server(flags, command=command, environment=environ) as process:
        process.wait_ready(600)
        server = Server(process.url)
        contenders: dict[str, Callable[[list[list[int]]], tuple[float, list[str]]]] = {
            "transformers, dynamic cache": lambda p: generate.run(p, num_tokens, "dynamic"),
            "transformers, static cache": lambda p: generate.run(p, num_tokens, "static"),
            "pyserve": lambda p: asyncio.run(server.run(p, num_tokens, stream=False)),
            "pyserve, streamed": lambda p: asyncio.run(server.run(p, num_tokens, stream=True)),
        }
        for batch in args.batch:

            def prompts_of(number: int, batch: int = batch) -> list[list[int]]:
                rng = np.random.default_rng([args.seed, batch, number])
                drawn: list[list[int]] = rng.choice(ids, (batch, args.prompt_len)).tolist()
                return drawn

            timings = compare(contenders, prompts_of, num_tokens, args.rounds)
            text, ratio = render(batch, timings)
            print(f"\n{text}")
            figures[f"batch_{batch}"] = {
                "ratio": ratio,
                "tokens_per_s": {name: timing.tokens_per_s for name, timing in timings.items()},
            }
    return figures


def main(argv: list[str] | None = None) -> int:
    """0: measured, whatever the ratio; 1: the server failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, help="folder (default: the demo model)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")
    add("--batch", type=int, nargs="+", default=[1, 16])
    add("--prompt-len", type=int, default=32)
    add("--new-tokens", type=int, default=128)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    add("flags", nargs="*", help="after --: more flags of the server")
    args = parser.parse_args(argv)
    try:
        figures = run(args)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    about = environment(["torch", "transformers", "pyserve"])
    write_json(args.json, {"environment": about, "result": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
