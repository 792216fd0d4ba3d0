"""`pyserve plan`: what of a model fits a card, how fast that can be, and what it costs.

From config.json, the headers of the weights where there are any, and the card's row in cards.py
(or the card that is here): no weights are needed, and no GPU. Memory comes from planner.py alone,
by a card that is made up; rates are rooflines.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from pyserve import flags, log
from pyserve.config import Dtype, EngineConfig, env
from pyserve.engine import device as devices
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.planner import GIB, MIB, CardMemory, MemoryPlan, format_ledger, plan_memory
from pyserve.errors import ConfigError, StartupError
from pyserve.model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from pyserve.model.config import ModelConfig, read_config
from pyserve.model.hub import fetch_headers
from pyserve.model.loader import check_checkpoint
from pyserve.model.weights import index_checkpoint
from pyserve.ops import device as card_here
from pyserve.plan.cards import CARDS, CONTEXT_BYTES, Card, find_card
from pyserve.plan.roofline import ModelSizes, decode_floor, measure_model, prefill_floor_s

CUDA = torch.device("cuda", 0)
BATCHES = (1, 8, 64)  # of the table of rates
CONTEXTS = tuple(2**power for power in range(11, 21))  # of the table of memory: 2,048 to 1,048,576
DEFAULT_MEAN_CONTEXT = 1024
UNLIMITED = CardMemory(total_bytes=2**50, used_bytes=CONTEXT_BYTES)
SECONDS_A_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Capacity:
    """A model, the settings it would run with, a card's memory, and the plan for it."""

    model: ModelConfig
    config: EngineConfig
    sizes: ModelSizes
    memory: CardMemory
    plan: MemoryPlan

    @property
    def num_tokens(self) -> int:
        """Of the KV cache."""
        return self.plan.num_blocks * self.config.block_size

    def longest_context(self, num_seqs: int) -> int:
        """Of each of num_seqs sequences that run at once; 0 where they do not."""
        blocks_each = self.plan.num_blocks // num_seqs
        return min(self.plan.max_model_len, blocks_each * self.config.block_size)

    def bytes_for(self, context_len: int, num_seqs: int) -> int:
        """The whole ledger where that is what the KV cache must hold, on any card."""
        num_blocks = num_seqs * num_blocks_for(context_len, self.config.block_size)
        config = msgspec.structs.replace(
            self.config,
            max_model_len=context_len,
            max_num_batched_tokens=self.plan.max_num_batched_tokens,
            gpu_memory_utilization=1.0,
            kv_cache_memory_bytes=num_blocks * self.plan.block_bytes,
        )
        return _plan(self.model, config, self.sizes, UNLIMITED).total_bytes


def named_memory(card: Card) -> CardMemory:
    """What a card of that kind shows when nothing but our CUDA context is on it."""
    return CardMemory(total_bytes=card.memory_mib * MIB, used_bytes=CONTEXT_BYTES)


def sizes_on_card(model: ModelConfig, config: EngineConfig, *, is_int4: bool = False) -> ModelSizes:
    """Raises ConfigError where a card cannot run the model or its dtype."""
    devices.check_model(model, CUDA)
    dtype = devices.resolve_dtype(config.dtype, model.dtype, CUDA)
    return measure_model(model, dtype, is_int4=is_int4)


def find_capacity(
    model: ModelConfig, config: EngineConfig, sizes: ModelSizes, memory: CardMemory
) -> Capacity:
    """Raises PlanError, with the ledger, where it does not fit."""
    return Capacity(model, config, sizes, memory, _plan(model, config, sizes, memory))


def _plan(
    model: ModelConfig, config: EngineConfig, sizes: ModelSizes, memory: CardMemory
) -> MemoryPlan:
    """planner.plan_memory, as the server calls it."""
    return plan_memory(
        model,
        config,
        weight_bytes=sizes.weight_bytes,
        kv_specs=list(sizes.kv_specs),
        itemsize=sizes.dtype.itemsize,
        memory=memory,
    )


def main(argv: list[str]) -> int:
    """Print the plan for the flags in `argv`, those after "plan"; returns the exit code."""
    try:
        args = _parse(argv)
        with tempfile.TemporaryDirectory(prefix="pyserve-") as scratch:
            model, stored_bytes = _read_model(args, Path(scratch))
        card, name, memory = _card(args.gpu)
        config = _engine_config(args)
        sizes = sizes_on_card(model, config, is_int4=args.quantization == "awq")
        capacity = find_capacity(model, config, sizes, memory)
        mean_context = min(args.mean_context, capacity.plan.max_model_len)
    except StartupError as error:
        log.get_logger().error("%s", error)
        return 2
    lines = _head(args, capacity, name, card)
    if stored_bytes is not None:
        lines.insert(1, f"  {stored_bytes / 1e9:.2f} GB of weights in its files")
    lines += _memory_lines(capacity)
    if card is not None:
        lines += _rate_lines(capacity, card, mean_context, args.price_per_day)
    print("\n".join(lines))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = flags.Parser(
        prog="python -m pyserve plan",
        usage="python -m pyserve plan --model MODEL [--gpu NAME] [flags]",
        description="What of a model fits a card, how fast it can be and what that costs, from "
        "config.json and the headers of the weights alone; no GPU is needed.",
        allow_abbrev=False,
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a folder with config.json, or a name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--download-dir", type=Path, help="where downloads are kept")
    parser.add_argument("--hf-token", help="access token of the hub (HF_TOKEN)")
    parser.add_argument(
        "--gpu", help=f'a card by its name, such as "{CARDS[4].name}" (default: the one here)'
    )
    parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16"], default="auto")
    parser.add_argument(
        "--quantization", "-q", choices=["awq"],
        help="awq: what int4 weights in groups of 128 would take; pyserve does not serve them yet",
    )  # fmt: skip
    parser.add_argument("--max-model-len", type=flags.size, help="context in tokens; 32k, 32K")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences that run at once")
    parser.add_argument("--max-num-batched-tokens", type=flags.size, help="tokens in a step")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a KV block")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="KV cache at most")
    parser.add_argument(
        "--mean-context", type=flags.size, default=DEFAULT_MEAN_CONTEXT,
        help=f"tokens behind each sequence in the table of rates ({DEFAULT_MEAN_CONTEXT})",
    )  # fmt: skip
    parser.add_argument("--price-per-day", type=float, help="of the card, in dollars")
    args, unknown = parser.parse_known_args([flags.canonical(word) for word in argv])
    for word in unknown:
        if word.startswith("-"):
            flags.refuse_unknown(parser, word)
        raise ConfigError(f"unexpected argument {word!r}")
    if (args.model is None) == (args.positional_model is None):
        raise ConfigError("plan needs one model: --model FOLDER or a name on the hub")
    args.model = args.model or args.positional_model
    if args.price_per_day is not None and not 0 < args.price_per_day < 1e6:
        raise ConfigError(f"--price-per-day must be in (0, 1000000), got {args.price_per_day}")
    if args.mean_context < 1:
        raise ConfigError(f"--mean-context must be at least 1, got {args.mean_context}")
    return args


def _read_model(args: argparse.Namespace, scratch: Path) -> tuple[ModelConfig, int | None]:
    """The model, and the bytes of its weights' files; None where there are none to look at.

    What is on the hub comes into `scratch`: config.json and the headers of the weights.
    """
    token = args.hf_token or env("HF_TOKEN") or env("HUGGING_FACE_HUB_TOKEN")
    folder = fetch_headers(
        args.model, scratch, revision=args.revision, token=token, download_dir=args.download_dir
    )
    try:
        raw = read_config(folder)
        if args.quantization == "awq":
            raw = _without_awq(raw)
        model = ModelConfig.from_hf(raw)
        if not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
            return model, None
        if args.quantization is None:
            check_checkpoint(folder, model, dtype=torch.bfloat16)
        return model, sum(tensor.num_bytes for tensor in index_checkpoint(folder).values())
    except StartupError as error:
        line = str(error).replace(f"{scratch}/", "").replace(str(scratch), args.model)
        raise type(error)(line) from error


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    dtype: Dtype = "float16" if args.dtype == "half" else args.dtype
    return EngineConfig(
        model_path=Path(args.model),
        dtype=dtype,
        device="cuda",
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    )


def _without_awq(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json as that of the model before AWQ, where it was quantised in the way we count."""
    stored = raw.get("quantization_config")
    if stored is None:
        return raw
    keys = ("quant_method", "bits", "group_size")
    found = tuple(stored.get(key) for key in keys) if isinstance(stored, dict) else None
    if found != ("awq", 4, 128):
        raise ConfigError(
            "config.json: --quantization awq counts 4 bits in groups of 128, quantization_config "
            f"says {msgspec.json.encode(stored).decode()[:80]}"
        )
    return {key: value for key, value in raw.items() if key != "quantization_config"}


def _card(wanted: str | None) -> tuple[Card | None, str, CardMemory]:
    """The card, its name and its memory; no Card where the one here is not in the table."""
    if wanted is not None:
        card = find_card(wanted)
        return card, card.name, named_memory(card)
    if not card_here.has_card():
        raise ConfigError(
            f"no NVIDIA card is here: name one with --gpu, {', '.join(card.name for card in CARDS)}"
        )
    card_here.check_cuda()
    name = torch.cuda.get_device_name(CUDA)
    try:
        known: Card | None = find_card(name)
    except ConfigError:
        known = None
    return known, f"{name} (the one here)", devices.card_memory(CUDA)


def _head(args: argparse.Namespace, capacity: Capacity, name: str, card: Card | None) -> list[str]:
    model, sizes = capacity.model, capacity.sizes
    dtype = str(sizes.dtype).removeprefix("torch.")
    lines = [
        f"{args.model}: {model.architecture}, {sizes.num_params / 1e9:.2f} G parameters, {dtype}, "
        f"context {model.max_model_len:,}",
        f"on {name}: {capacity.memory.total_bytes / MIB:,.0f} MiB as CUDA shows it",
    ]
    if args.quantization == "awq":
        lines[0] += ", its layers' matrices in int4 as AWQ's: NOT SERVED YET, sizes only"
    if card is not None:
        major, minor = card.capability
        lines.append(
            f"  {card.bandwidth_tb:.2f} TB/s, {card.bf16_tflops:.0f} TFLOP/s ({card.source}), "
            f"{card.num_sms} SMs, compute capability {major}.{minor}"
        )
    else:
        lines.append("  this card is not in the table: no rates; --gpu names one that is")
    return lines


def _memory_lines(capacity: Capacity) -> list[str]:
    plan, model, config = capacity.plan, capacity.model, capacity.config
    allowed_bytes = int(capacity.memory.total_bytes * config.gpu_memory_utilization)
    lines = [
        "",
        f"memory, --gpu-memory-utilization {config.gpu_memory_utilization:g}:",
        format_ledger(plan.ledger),
        f"KV cache: {capacity.num_tokens:,} tokens of "
        f"{capacity.sizes.kv_bytes_per_token / 1024:g} KiB",
    ]
    if plan.max_model_len < model.max_model_len and config.max_model_len is None:
        lines.append(
            f"the model's context of {model.max_model_len:,} tokens does not fit: "
            f"{plan.max_model_len:,} would be served"
        )
    counts = sorted({1, min(8, plan.num_slots), plan.num_slots})
    rows = [["sequences at once", *(f"{count:,}" for count in counts)]]
    rows.append(["tokens each", *(f"{capacity.longest_context(n):,}" for n in counts)])
    lines += ["", "the longest context of each:", *_aligned(rows)]
    rows = [["context", "1 sequence", "fits", "8 sequences", "fits"]]
    for length in _contexts(plan, model):
        row = [f"{length:,}"]
        for count in (1, 8):
            needed = capacity.bytes_for(length, count)
            fits = needed <= allowed_bytes - capacity.memory.others_bytes
            row += [f"{needed / GIB:,.1f}", "yes" if fits else "no"]
        rows.append(row)
    return [
        *lines,
        "",
        f"GiB that all of it needs, of {allowed_bytes / GIB:,.1f} that may be used:",
        *_aligned(rows),
    ]


def _contexts(plan: MemoryPlan, model: ModelConfig) -> list[int]:
    """Lengths worth a row: powers of two below the model's context, that, and what fits."""
    lengths = {length for length in CONTEXTS if length < model.max_model_len}
    return sorted(lengths | {model.max_model_len, plan.max_model_len})


def _rate_lines(
    capacity: Capacity, card: Card, mean_context: int, price_per_day: float | None
) -> list[str]:
    most = min(capacity.plan.num_slots, capacity.num_tokens // mean_context)
    # Where the largest batch does not fit, the largest that does.
    batches = sorted({min(batch, most) for batch in BATCHES})
    header = ["sequences", "tokens/s each", "tokens/s", "ms a step", "bound by"]
    rows = [header + (["$ per million tokens"] if price_per_day is not None else [])]
    for batch in batches:
        floor = decode_floor(capacity.sizes, card, batch=batch, context_len=mean_context)
        rate = batch / floor.seconds
        row = [
            f"{batch:,}", f"{1 / floor.seconds:,.1f}", f"{rate:,.0f}",
            f"{floor.seconds * 1000:.2f}", floor.bound,
        ]  # fmt: skip
        if price_per_day is not None:
            row.append(f"{price_per_day / SECONDS_A_DAY / rate * 1e6:,.3f}")
        rows.append(row)
    prefill_s = prefill_floor_s(capacity.sizes, card, mean_context)
    lines = [
        "",
        f"roofline of decoding with {mean_context:,} tokens behind each sequence:",
        *_aligned(rows),
        f"a prompt of {mean_context:,} tokens takes at least {prefill_s * 1000:,.0f} ms "
        f"({mean_context / prefill_s:,.0f} tokens/s)",
        "roofline: bytes and operations at the card's rates; real servers reach 60-90 %",
    ]
    if price_per_day is not None:
        lines.append(
            f"$: of output tokens at the roofline, at {price_per_day:g} a day, the card busy so "
            "all day"
        )
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Columns flush right, the first one flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  " + "  ".join(cells).rstrip()
