"""Do adapters come and go unfelt? Loads, reloads and unloads under streams that use them.

    python -m bench.adapter_churn                     # 1,000 changes under 64 streams
    python -m bench.adapter_churn -n 100 --streams 8

Two versions of six adapters of the demo model are written, of random numbers, so that each answers
in its own way, as does the base model: these answers are taken first, one by one. Then streams ask
for all names while these are loaded, loaded again with their other version, and unloaded. In
float32 an answer does not depend on its batch mates, so each must be, word for word, that of a
version that was served between its request and its first token, or a 404 where the name was not.

Without --url a server is started (flags after `--` go to it). Exit code 1 where a check fails: an
answer of none of these, a change that is refused, something that is held afterwards, memory that
grew, files that stay open, a stream that stood still for too long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.fuzz import count_files, wait_files
from bench.soak import Tally, judge_soak, make_parser, metrics, run_soak, send
from bench.trial import Trial, conclude, try_server
from pyserve.http_client import Endpoint, Reply, fetch

NAMES = ("one", "two", "three", "four", "five", "six")
BASE = "pyserve-demo"
VERSIONS = ("a", "b")
QUESTIONS = ("What is the capital of France?", "Escribe un poema", "Explain gravity.")
NUM_LAYERS, RANK = 8, 8
SHAPES = {"mlp.down_proj": (256, 576), "self_attn.q_proj": (256, 256)}  # [out, in]
SIZE = 2.0  # of what an adapter adds beside what its matrix does: enough to say something else
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FLAGS = (
    "--dtype", "float32", "--served-model-name", BASE, "--enable-lora", "--max-lora-rank", "16",
    "--max-loras", "4", "--max-cpu-loras", "8",
)  # fmt: skip


def write_adapter(folder: Path, seed: int) -> None:
    """An adapter of the demo model, as PEFT saves it, of random numbers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(NUM_LAYERS):
        for name, (num_out, num_in) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(RANK, num_in, generator=generator) / math.sqrt(num_in)
            b = torch.randn(num_out, RANK, generator=generator) * SIZE / math.sqrt(RANK)
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(slots=True)
class Served:
    """What a name may have meant, and when: times of time.perf_counter.

    began_s   when what put it there was asked for.
    ended_s   when what took it away was answered; infinite: it is there.
    """

    version: str | None  # None: the name was not served
    began_s: float
    ended_s: float = math.inf


@dataclass(slots=True)
class History:
    """Of one name."""

    served: list[Served] = field(default_factory=lambda: [Served(None, -math.inf)])

    @property
    def now(self) -> str | None:
        return self.served[-1].version

    def change(self, version: str | None, asked_s: float, answered_s: float) -> None:
        self.served[-1].ended_s = answered_s
        self.served.append(Served(version, asked_s))

    def between(self, began_s: float, ended_s: float) -> set[str | None]:
        """The versions that it may have had at some time between the two."""
        return {
            one.version for one in self.served if one.began_s <= ended_s and one.ended_s >= began_s
        }


class Churn:
    """The adapters of one server, what was asked of them, and what came.

    answers   (name and version, question) -> the text, taken alone; base: of the base model.
    """

    def __init__(self, endpoint: Endpoint, folder: Path, args: argparse.Namespace) -> None:
        self.histories = {name: History() for name in NAMES}
        self.answers: dict[tuple[str, str], str] = {}
        self.max_gap_s = self.max_first_s = self.max_change_s = 0.0
        self.num_changes = self.num_refused = 0
        self._endpoint = endpoint
        self._folder = folder
        self._args = args

    async def take_answers(self) -> None:
        """RuntimeError where two adapters answer alike: nothing could be told from them."""
        for number, key in enumerate(f"{name}-{version}" for name in NAMES for version in VERSIONS):
            await asyncio.to_thread(write_adapter, self._folder / key, number)
            await self._post(LOAD, {"lora_name": key, "lora_path": str(self._folder / key)})
            await self._ask_alone(key)
            await self._post(UNLOAD, {"lora_name": key})
        await self._ask_alone(BASE)
        for question in QUESTIONS:
            texts = [text for (_, asked), text in self.answers.items() if asked == question]
            if len(set(texts)) < len(texts):
                raise RuntimeError(f"two adapters answer {question!r} alike: {sorted(texts)}")

    async def run_part(
        self, endpoint: Endpoint, tally: Tally, rng: np.random.Generator,
        args: argparse.Namespace, share: int,
    ) -> None:  # fmt: skip
        """`share` changes, one after the other, while streams ask for all names."""
        is_over = asyncio.Event()

        async def stream(own: np.random.Generator) -> None:
            while not is_over.is_set():
                name = str(own.choice([*NAMES, BASE]))
                await self._stream(tally, name, str(own.choice(QUESTIONS)))

        streams = [asyncio.create_task(stream(own)) for own in rng.spawn(args.streams)]
        try:
            for _ in range(share):
                await self._change(rng)
                await asyncio.sleep(args.pause_s)
        finally:
            is_over.set()
            await asyncio.gather(*streams)

    async def unload_all(self) -> None:
        for name, history in self.histories.items():
            if history.now is not None:
                await self._post(UNLOAD, {"lora_name": name})

    async def _change(self, rng: np.random.Generator) -> None:
        name = str(rng.choice(NAMES))
        history = self.histories[name]
        asked_s = time.perf_counter()
        if history.now is not None and rng.random() < 0.3:
            version = None
            await self._post(UNLOAD, {"lora_name": name})
        else:
            version = str(rng.choice(VERSIONS))
            body = {"lora_name": name, "lora_path": str(self._folder / f"{name}-{version}")}
            await self._post(LOAD, {**body, "load_inplace": history.now is not None})
        answered_s = time.perf_counter()
        history.change(version, asked_s, answered_s)
        self.num_changes += 1
        self.max_change_s = max(self.max_change_s, answered_s - asked_s)

    async def _stream(self, tally: Tally, name: str, question: str) -> None:
        reply = await self._ask(name, question)
        times = [reply.started_s, *reply.chunk_times]
        first_s = times[1] if len(times) > 1 else reply.ended_s
        versions: set[str | None] = {""}
        if name != BASE:
            versions = self.histories[name].between(reply.started_s, first_s)
        tally.num_sent += 1
        if reply.status == 404 and None in versions:
            self.num_refused += 1
            return
        if reply.error is not None:
            tally.failures[reply.error[:200]] += 1
            return
        keys = [f"{name}-{version}" if version else name for version in versions - {None}]
        expected = [self.answers[key, question] for key in keys]
        if reply.texts[0] not in expected:
            tally.failures[f"{name} ({', '.join(keys)}) answers as none of these"] += 1
            return
        tally.num_complete += 1
        tally.output_tokens += reply.num_output_tokens
        self.max_first_s = max(self.max_first_s, first_s - reply.started_s)
        gaps = [later - earlier for earlier, later in zip(times[1:], times[2:], strict=False)]
        self.max_gap_s = max([self.max_gap_s, *gaps])

    async def _ask_alone(self, key: str) -> None:
        for question in QUESTIONS:
            reply = await self._ask(key, question)
            if reply.error is not None:
                raise RuntimeError(f"{key} alone: {reply.error}")
            self.answers[key, question] = reply.texts[0]

    async def _ask(self, name: str, question: str) -> Reply:
        body = {
            "model": name, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": self._args.max_tokens, "ignore_eos": True, "stream": True,
            "skip_special_tokens": False,  # a token without text would be taken for a pause
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        request = self._endpoint.encode("POST", "/v1/chat/completions", body)
        reply = await send(self._endpoint, request)
        assert reply is not None
        return reply

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        reply = await fetch(self._endpoint, path, body)
        if reply.status != 200:
            raise RuntimeError(f"{path} {body}: {reply.error or reply.body[:300]!r}")


async def _run_all(
    trial: Trial, args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], Churn, list[str]]:
    churn = Churn(trial.endpoint, folder, args)
    await churn.take_answers()
    num_files = count_files(trial.pid)
    result = await run_soak(trial.endpoint, trial.pid, args, churn.run_part)
    await churn.unload_all()
    num_files_after = await wait_files(trial.pid, num_files)
    problems = []
    if num_files is not None and num_files_after is not None and num_files_after > num_files:
        problems.append(f"{num_files_after - num_files} open files more")
    values = await metrics(trial.endpoint)
    result["num_reads"] = values.get("pyserve:adapter_loads_total")
    return result, churn, problems


def _run(trial: Trial, args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        result, churn, problems = asyncio.run(_run_all(trial, args, Path(folder)))
    problems += judge_soak(result, args)
    if churn.max_gap_s > args.max_gap_s:
        problems.append(f"a stream stood still for {churn.max_gap_s:.3f} s")
    more = (
        f"; {churn.num_changes:,} changes under {args.streams} streams, the slowest in "
        f"{1e3 * churn.max_change_s:.0f} ms; {result['num_complete']:,} answers by their adapter, "
        f"{churn.num_refused:,} names not served; longest gap {1e3 * churn.max_gap_s:.0f} ms, "
        f"wait for a first token {1e3 * churn.max_first_s:.0f} ms"
    )
    return conclude(
        args, "adapter churn", problems, good="nobody noticed", more=more, result=result,
        max_gap_s=churn.max_gap_s, max_first_s=churn.max_first_s,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    parser = make_parser(__doc__)
    parser.set_defaults(num_requests=1000, streams=64, max_tokens=32, warm_parts=2)
    parser.add_argument("--pause-s", type=float, default=0.05, help="between two changes")
    args = parser.parse_args(argv)
    return try_server(args, lambda trial: _run(trial, args), FLAGS)


if __name__ == "__main__":
    sys.exit(main())
