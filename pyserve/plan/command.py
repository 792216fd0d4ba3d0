"""`pyserve plan`: which card a model needs, how much of it fits on a card, its speed and its cost.

Everything is computed from config.json, the headers of the weight files if there are any, and the
rows of cards.py or the card of this machine. Neither the weights nor a GPU are needed.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pyserve import flags, log
from pyserve.checkpoint_files import INDEX_FILE, SINGLE_FILE
from pyserve.config import EngineConfig, LaunchConfig
from pyserve.engine import devices
from pyserve.engine.planner import GIB, MIB, CardMemory, MemoryPlan, format_ledger
from pyserve.errors import ConfigError, StartupError
from pyserve.flag_rows import settings, size
from pyserve.flag_words import plain_words
from pyserve.hub.resolve import model_headers
from pyserve.model.config import ModelConfig
from pyserve.model.loader import check_checkpoint
from pyserve.model.sharing import tp_sizes
from pyserve.model.weights import index_checkpoint
from pyserve.ops import cuda_card
from pyserve.plan.capacity import CUDA, Capacity, find_capacity, named_memory, sizes_on_card
from pyserve.plan.cards import CARDS, Card, find_card, find_card_that_is_here
from pyserve.plan.choice import COUNTS, SECONDS_A_DAY, choice_lines, find_choices
from pyserve.plan.roofline import ModelSizes, decode_floor, prefill_floor_s
from pyserve.plan.table import aligned

HERE = "here"  # --gpu's word for the card of this machine
BATCHES = (1, 8, 64)  # batch sizes in the table of rates
# Context lengths in the table of memory: 2,048 to 1,048,576.
CONTEXTS = tuple(2**power for power in range(11, 21))
DEFAULT_MEAN_CONTEXT = 1024
ROOFLINE = "roofline: bytes and operations at the card's rates; real servers reach 60-90 %"
# The flags that `plan` shares with the server.
SHARED_FLAGS = (
    "revision", "download-dir", "hf-token", "dtype", "quantization", "runner", "max-model-len",
    "max-num-seqs", "max-num-batched-tokens", "block-size", "gpu-memory-utilization",
    "kv-cache-memory-bytes", "enforce-eager",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the plan for `argv`, the arguments after "plan". Returns the exit code."""
    try:
        args = _parse(argv)
        prices = _prices(args.price_per_day, args.gpu)
        model, stored_bytes = _read_model(args)
        if args.gpu is None:
            lines = _which_card(args, model, prices)
        else:
            lines = _one_card(args, model, prices)
    except StartupError as error:
        log.get_logger().error("%s", error)
        return 2
    if stored_bytes is not None:
        lines.insert(1, f"  {stored_bytes / 1e9:.2f} GB of weights in its files")
    print("\n".join(lines))
    return 0


def _which_card(
    args: argparse.Namespace, model: ModelConfig, prices: dict[str, float]
) -> list[str]:
    """Without --gpu: all known cards on which the model fits, alone or with others of
    their kind.
    """
    config = _engine_config(args)
    counts = tuple(count for count in COUNTS if count in tp_sizes(model))
    if args.tensor_parallel_size is not None:
        counts = (args.tensor_parallel_size,)
    choices = find_choices(
        model, config, counts=counts, mean_context=args.mean_context, prices=prices
    )
    if not choices:
        raise ConfigError(
            f"{args.model} fits none of the {len(CARDS)} known cards, {_tried(counts)}, with these "
            "settings; --gpu NAME tells what is missing"
        )
    # Any choice will do: the lines below describe the whole model.
    sizes = choices[0].capacity.sizes
    lines = [*_model_lines(args, model, sizes), ""]
    lines.append(f"the known cards that hold it, {_tried(counts)}:")
    if cuda_card.has_card():
        lines.insert(1, f"  --gpu {HERE} tells more about the card of this machine")
    return lines + choice_lines(choices, has_prices=bool(prices))


def _tried(counts: tuple[int, ...]) -> str:
    if counts == (1,):
        return "one alone"
    return f"{' or '.join(map(str, counts))} of a kind"


def _one_card(args: argparse.Namespace, model: ModelConfig, prices: dict[str, float]) -> list[str]:
    """With --gpu: the memory ledger, the contexts that fit, and the rates on that card."""
    place = _place(args.gpu)
    config = _engine_config(args)
    tp_size = args.tensor_parallel_size or 1
    sizes = sizes_on_card(model, config, tp_size=tp_size)
    capacity = find_capacity(model, config, sizes, place.memory)
    lines = _model_lines(args, model, sizes)
    lines += _card_lines(place, tp_size)
    lines += _memory_lines(capacity, tp_size)
    if place.card is not None:
        mean_context = min(args.mean_context, capacity.plan.max_model_len)
        price = prices.get(place.card.name)
        price = None if price is None else price * tp_size
        lines += _rate_lines(capacity, place.card, mean_context, price)
    return lines


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    args = flags.parse(parser, plain_words(parser, argv))
    if (args.model is None) == (args.positional_model is None):
        raise ConfigError("plan needs one model: --model FOLDER or a name on the hub")
    args.model = args.model or args.positional_model
    if args.mean_context < 1:
        raise ConfigError(f"--mean-context must be at least 1, got {args.mean_context}")
    return args


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="python -m pyserve plan",
        usage="python -m pyserve plan --model MODEL [--gpu NAME] [flags]",
        description="Which card a model needs; with --gpu, what of it fits there, how fast it can "
        "be and what that costs. From config.json and the headers of the weights alone; no GPU is "
        "needed.",
        allow_abbrev=False,
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a folder with config.json, or a name on the hub")
    for name in SHARED_FLAGS:
        flags.add_flag(parser, flags.ROWS[name])
    parser.add_argument(
        "--gpu",
        help=f'a card by its name, such as "RTX 4090", or "{HERE}": this machine\'s '
        "(default: compare all cards that are known)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        choices=(1, 2, 4, 8),
        help="cards that share each layer "
        "(default: one, or as few as it takes where cards are compared)",
    )
    parser.add_argument(
        "--mean-context",
        type=size,
        default=DEFAULT_MEAN_CONTEXT,
        help=f"tokens behind each sequence in the table of rates ({DEFAULT_MEAN_CONTEXT})",
    )
    parser.add_argument(
        "--price-per-day",
        nargs="+",
        default=[],
        metavar="DOLLARS",
        help='of the card in --gpu, or "RTX 4090=8.5" for each card whose price you know',
    )
    return parser


def _prices(said: list[str], gpu: str | None) -> dict[str, float]:
    """Card.name -> dollars a day for one card, from --price-per-day. Raises ConfigError."""
    prices: dict[str, float] = {}
    for text in said:
        name, equals, amount = text.rpartition("=")
        if not equals and gpu is None:
            raise ConfigError(
                f"--price-per-day {text}: of which card? Write 'RTX 4090={text}', or name it with "
                "--gpu"
            )
        card = (
            _place(gpu).card
            if not equals and gpu is not None
            else find_card(name, flag="--price-per-day")
        )
        try:
            price = float(amount)
        except ValueError:
            price = 0.0
        if not 0 < price < 1e6:
            raise ConfigError(f"--price-per-day must be in (0, 1000000), got {amount}")
        if card is not None:
            prices[card.name] = price
    return prices


def _read_model(args: argparse.Namespace) -> tuple[ModelConfig, int | None]:
    """The model, and the bytes of its weights in files; None if the folder has no weight files."""
    launch = LaunchConfig(**settings(flags.LAUNCH, args))
    with model_headers(
        args.model, revision=launch.revision, token=launch.token, download_dir=launch.download_dir
    ) as folder:
        try:
            return _read_headers(args, folder)
        except StartupError as error:
            # A model from the hub is in a temporary folder, so the error shows the model's name
            # instead.
            if os.path.isdir(os.path.expanduser(args.model)):
                raise
            line = str(error).replace(f"{folder}/", "").replace(str(folder), args.model)
            raise type(error)(line) from error


def _read_headers(args: argparse.Namespace, folder: Path) -> tuple[ModelConfig, int | None]:
    config = _engine_config(args)
    model = ModelConfig.from_path(folder, use=config.use).quantised_as(config.quantization)
    if not any(os.path.lexists(folder / name) for name in (SINGLE_FILE, INDEX_FILE)):
        return model, None
    check_checkpoint(folder, model)
    return model, sum(tensor.num_bytes for tensor in index_checkpoint(folder).values())


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    shape = settings(flags.ENGINE, args)
    return EngineConfig(**shape, model_path=Path(args.model), device="cuda")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the model would run. card: None if it is the card of this machine, and not in the
    table.
    """

    card: Card | None
    name: str
    memory: CardMemory


def _place(wanted: str) -> Place:
    if wanted != HERE:
        card = find_card(wanted)
        return Place(card, card.name, named_memory(card))
    if not cuda_card.has_card():
        raise ConfigError(f"--gpu {HERE}: no NVIDIA card is here; name one, or leave --gpu out")
    cuda_card.check_cuda()
    name = torch.cuda.get_device_name(CUDA)
    memory = devices.card_memory(CUDA)
    try:
        known: Card | None = find_card_that_is_here(name, memory.total_bytes)
    except ConfigError:
        known = None
    return Place(known, f"{name} (the one here)", memory)


def _model_lines(args: argparse.Namespace, model: ModelConfig, sizes: ModelSizes) -> list[str]:
    line = f"{args.model}: {model.architecture}, {sizes.num_params / 1e9:.2f} G parameters, "
    if sizes.mixtures:
        line += f"{sizes.num_params_of_a_token / 1e9:.2f} G of them active, "
    line += f"{str(sizes.dtype).removeprefix('torch.')}, context {model.max_model_len:,}"
    if model.quantization is not None:
        line += f", {model.quantization.words()}"
    lines = [line]
    if sizes.mixtures:
        lines.append(_mixture_line(model, sizes))
    lacks = model.lacking_on_cuda()
    if lacks:
        lines.append(f"  NOT SERVED YET on a card, sizes only: {', '.join(lacks)}")
    return lines


def _mixture_line(model: ModelConfig, sizes: ModelSizes) -> str:
    """Describes the first layer with a mixture of experts; in the known families all are alike."""
    mixture = sizes.mixtures[0]
    config = mixture.config
    each_mb = mixture.bytes_each * mixture.params_of_whole_expert / mixture.params_each / 1e6
    line = (
        f"  {len(sizes.mixtures)} of {len(model.layers)} layers have {config.num_experts} experts "
        f"of {each_mb:,.1f} MB, {config.top_k} a token"
    )
    return line + (f", and one of width {config.shared_size:,}" if config.shared_size else "")


def _card_lines(place: Place, tp_size: int) -> list[str]:
    count = f"{tp_size} x " if tp_size > 1 else ""
    each = " each" if tp_size > 1 else ""
    shown_mib = place.memory.total_bytes / MIB
    lines = [f"on {count}{place.name}: {shown_mib:,.0f} MiB{each} as CUDA shows it"]
    if place.card is None:
        return [*lines, "  this card is not in the table: no rates; --gpu names one that is"]
    major, minor = place.card.capability
    lines.append(
        f"  {place.card.bandwidth_tb:.2f} TB/s, {place.card.bf16_tflops:.0f} TFLOP/s "
        f"({place.card.source}), {place.card.num_sms} SMs, compute capability {major}.{minor}"
    )
    if tp_size > 1:
        lines.append(
            "  they share each layer (tensor parallel): what they tell each other is not counted"
        )
    return lines


def _memory_lines(capacity: Capacity, tp_size: int) -> list[str]:
    plan, model, config = capacity.plan, capacity.model, capacity.config
    allowed_bytes = int(capacity.memory.total_bytes * config.gpu_memory_utilization)
    lines = [
        "",
        f"memory{' of each card' if tp_size > 1 else ''}, --gpu-memory-utilization "
        f"{config.gpu_memory_utilization:g}:",
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
    lines += ["", "the longest context of each:", *aligned(rows)]
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
        *aligned(rows),
    ]


def _contexts(plan: MemoryPlan, model: ModelConfig) -> list[int]:
    """Context lengths for the table: powers of two below the model's context, that, and
    what fits.
    """
    lengths = {length for length in CONTEXTS if length < model.max_model_len}
    return sorted(lengths | {model.max_model_len, plan.max_model_len})


def _rate_lines(
    capacity: Capacity, card: Card, mean_context: int, price_per_day: float | None
) -> list[str]:
    if capacity.model.pooling is not None:
        return _pooling_lines(capacity, card, mean_context, price_per_day)
    most = min(capacity.plan.num_slots, capacity.num_tokens // mean_context)
    # A batch that does not fit is replaced by the largest that does.
    batches = sorted({min(batch, most) for batch in BATCHES})
    header = ["sequences", "tokens/s each", "tokens/s", "ms a step", "bound by"]
    rows = [header + (["$ per million tokens"] if price_per_day is not None else [])]
    for batch in batches:
        floor = decode_floor(capacity.sizes, card, batch=batch, context_len=mean_context)
        rate = batch / floor.seconds
        row = [
            f"{batch:,}",
            f"{1 / floor.seconds:,.1f}",
            f"{rate:,.0f}",
            f"{floor.seconds * 1000:.2f}",
            floor.bound,
        ]
        if price_per_day is not None:
            row.append(f"{price_per_day / SECONDS_A_DAY / rate * 1e6:,.3f}")
        rows.append(row)
    prefill_s = prefill_floor_s(capacity.sizes, card, mean_context)
    lines = [
        "",
        f"roofline of decoding with {mean_context:,} tokens behind each sequence:",
        *aligned(rows),
        f"a prompt of {mean_context:,} tokens takes at least {prefill_s * 1000:,.0f} ms "
        f"({mean_context / prefill_s:,.0f} tokens/s)",
        ROOFLINE,
        *(["experts: as if a step's tokens drew theirs evenly"] if capacity.sizes.mixtures else []),
    ]
    if price_per_day is not None:
        lines.append(
            f"$: of output tokens at the roofline, at {price_per_day:g} a day in all, busy so all "
            "day"
        )
    return lines


def _pooling_lines(
    capacity: Capacity, card: Card, num_tokens: int, price_per_day: float | None
) -> list[str]:
    """The rates of a model that only reads texts of num_tokens, and generates nothing."""
    prefill_s = prefill_floor_s(capacity.sizes, card, num_tokens)
    rate = num_tokens / prefill_s
    lines = [
        "",
        f"a text of {num_tokens:,} tokens takes at least {prefill_s * 1000:,.2f} ms alone; texts "
        f"in steps of as many tokens: {1 / prefill_s:,.0f} texts/s, {rate:,.0f} tokens/s",
        ROOFLINE,
    ]
    if price_per_day is not None:
        price = price_per_day / SECONDS_A_DAY / rate * 1e6
        lines.append(
            f"${price:,.4f} per million tokens read, at {price_per_day:g} a day in all, busy so "
            "all day"
        )
    return lines
