"""`pyserve bench serve`: load on any OpenAI server, with flags, output and JSON of vLLM's bench.

workload.py makes the load, in a process of its own. It needs no tokenizer: random prompts are token
ids below --vocab-size, or words for chats, whose template no client knows; and tokens are counted
from the server's usage. The metrics are defined as in vLLM:

    TTFT  time from the request to the first frame with tokens
    TPOT  (last frame - first frame) / (output tokens - 1), of each request
    ITL   time between frames; a frame holds several tokens where the server was ahead of its reader
    E2EL  time from the request to the end of its answer
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pyserve import flags, log
from pyserve.errors import ConfigError, StartupError
from pyserve.flag_words import plain_words
from pyserve.http_client import Endpoint
from pyserve.remote.server import ServerError, endpoint_of, served_models
from pyserve.remote.workload import LoadSpec, RequestRecord, run_load, time_per_output_token

BACKENDS = {  # name -> whether its requests are chats
    "openai": False, "vllm": False, "openai-chat": True, "pyserve": False,
}  # fmt: skip
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
WIDTH = 50
WARMUP_NUMBER = 2**32  # warm-up requests are numbered from here, so that they differ from the run's
# Flags of vLLM's bench that have no meaning here -> whether they take a value.
IGNORED = {
    "tokenizer": 1, "tokenizer-mode": 1, "trust-remote-code": 0, "skip-tokenizer-init": 0,
    "disable-tqdm": 0, "disable-shuffle": 0,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the bench; returns the exit code.

    0: every request was answered; 1: some or all failed, or no server answers; 2: a wrong flag.
    """
    try:
        if argv[:1] != ["serve"]:
            raise ConfigError("pyserve has one bench: pyserve bench serve (see its --help)")
        parser = _parser()
        args = flags.parse(parser, plain_words(parser, argv[1:]))
        url, endpoint = _place(args)
        goals = _goals(args.goodput)
        spec = _spec(args, url)
        models = _wait_ready(url, endpoint, args.ready_check_timeout_sec)
        spec = msgspec.structs.replace(spec, models=(_model(args, models),))
        _warm_up(spec, args.num_warmups)
    except StartupError as error:
        log.get_logger().error("%s", error)
        return 2
    except ServerError as error:
        log.get_logger().error("%s", error)
        return 1
    print(f"Traffic request rate: {_rate(spec):g}", flush=True)
    try:
        (report,) = run_load(spec, 1)
    except RuntimeError as error:
        log.get_logger().error("%s", error)
        return 1
    percentiles = _percentiles(args.metric_percentiles)
    figures = measure(report.records, goals, percentiles)
    print(render(figures, spec, args.percentile_metrics.split(","), percentiles))
    for text, count in figures["error_counts"].items():
        print(f"error x{count}: {text}", file=sys.stderr)
    if args.save_result or args.save_detailed or args.result_filename:
        path = _save(args, spec, figures)
        print(f"saved in {path}", file=sys.stderr)
    return 1 if figures["failed"] else 0


def measure(
    records: list[RequestRecord], goals: dict[str, float], percentiles: list[float]
) -> dict[str, Any]:
    """All figures, under the keys of vLLM's JSON.

    goals  metric -> limit in ms, of --goodput. Keys that end in _ms are in ms; duration, ttfts and
    itls are in s.
    """
    records = sorted(records, key=lambda record: record.number)
    good = [record for record in records if record.error is None]
    duration = max(r.ended_s for r in records) - min(r.started_s for r in records)
    times = {
        "ttft": [1e3 * (r.first_s - r.started_s) for r in good if r.first_s is not None],
        "tpot": [1e3 * tpot for r in good if (tpot := time_per_output_token(r)) is not None],
        "itl": [1e3 * gap for r in good for gap in r.gaps],
        "e2el": [1e3 * (r.ended_s - r.started_s) for r in good],
    }
    num_input = sum(record.num_prompt_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    errors = [record.error for record in records if record.error is not None]
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(errors),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration,
        "request_goodput": _num_meeting(good, goals) / duration if goals else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": _most_tokens_a_second(good),
        "max_concurrent_requests": _most_at_once(records),
        "error_counts": {text: errors.count(text) for text in dict.fromkeys(errors[:1000])},
    }
    for name, values in times.items():
        array = np.asarray(values or [0.0])
        figures[f"mean_{name}_ms"] = float(array.mean())
        figures[f"median_{name}_ms"] = float(np.median(array))
        figures[f"std_{name}_ms"] = float(array.std())
        for percent in percentiles:
            figures[f"p{percent:g}_{name}_ms"] = float(np.percentile(array, percent))
    return figures | {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [(r.first_s or r.ended_s) - r.started_s for r in records],
        "itls": [record.gaps for record in records],
        "errors": [record.error or "" for record in records],
    }


def render(
    figures: dict[str, Any], spec: LoadSpec, metrics: list[str], percentiles: list[float]
) -> str:
    """The table of results, with vLLM's labels, because scripts parse it."""
    rows: list[tuple[str, int | float]] = [
        ("Successful requests:", figures["completed"]),
        ("Failed requests:", figures["failed"]),
    ]
    if spec.request_rate is None:
        rows.append(("Maximum request concurrency:", spec.concurrency))
    else:
        rows.append(("Request rate configured (RPS):", spec.request_rate))
    rows += [
        ("Benchmark duration (s):", figures["duration"]),
        ("Total input tokens:", figures["total_input_tokens"]),
        ("Total generated tokens:", figures["total_output_tokens"]),
        ("Request throughput (req/s):", figures["request_throughput"]),
    ]
    if figures["request_goodput"] is not None:
        rows.append(("Request goodput (req/s):", figures["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", figures["output_throughput"]),
        ("Peak output token throughput (tok/s):", figures["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", float(figures["max_concurrent_requests"])),
        ("Total token throughput (tok/s):", figures["total_token_throughput"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", *(_row(*row) for row in rows)]
    for name in metrics:
        word, title = METRICS[name]
        lines.append(f"{title:-^{WIDTH}}")
        lines.append(_row(f"Mean {word} (ms):", figures[f"mean_{name}_ms"]))
        lines.append(_row(f"Median {word} (ms):", figures[f"median_{name}_ms"]))
        for percent in percentiles:
            lines.append(_row(f"P{percent:g} {word} (ms):", figures[f"p{percent:g}_{name}_ms"]))
    return "\n".join([*lines, "=" * WIDTH])


def _row(label: str, value: int | float) -> str:
    shown = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
    return f"{label:<40} {shown}"


def _most_tokens_a_second(records: list[RequestRecord]) -> float:
    """The most output tokens in any one second since the first request.

    The tokens of a request are taken to be spread evenly over its frames.
    """
    began_s = min((record.started_s for record in records), default=0.0)
    seconds: dict[int, float] = {}
    for record in records:
        if record.first_s is None:
            continue
        frames_s = record.first_s + np.concatenate([[0.0], np.cumsum(record.gaps)])
        each = record.num_output_tokens / len(frames_s)
        for second in (frames_s - began_s).astype(int).tolist():
            seconds[second] = seconds.get(second, 0.0) + each
    return max(seconds.values(), default=0.0)


def _most_at_once(records: list[RequestRecord]) -> int:
    changes = [(r.started_s, 1) for r in records] + [(r.ended_s, -1) for r in records]
    num_now = most = 0
    for _, change in sorted(changes):
        num_now += change
        most = max(most, num_now)
    return most


def _num_meeting(records: list[RequestRecord], goals: dict[str, float]) -> int:
    count = 0
    for record in records:
        times = {
            "ttft": math.inf if record.first_s is None else record.first_s - record.started_s,
            "tpot": time_per_output_token(record) or 0.0,
            "e2el": record.ended_s - record.started_s,
        }
        count += all(1e3 * times[name] <= goal for name, goal in goals.items())
    return count


def _save(args: argparse.Namespace, spec: LoadSpec, figures: dict[str, Any]) -> Path:
    """Write the JSON of --save-result; returns its path."""
    now, model = datetime.now(), spec.models[0]
    rate = "inf" if spec.request_rate is None else f"{spec.request_rate:g}"
    detailed = ("input_lens", "output_lens", "ttfts", "itls", "errors")
    shown = {
        name: value
        for name, value in figures.items()
        if name != "error_counts" and (args.save_detailed or name not in detailed)
    }
    result = {
        "date": now.strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": args.tokenizer or model,
        "num_prompts": spec.num_requests,
        **dict(pair.partition("=")[::2] for pair in args.metadata or ()),
        "request_rate": "inf" if spec.request_rate is None else spec.request_rate,
        "burstiness": spec.burstiness,
        "max_concurrency": args.max_concurrency,
        **shown,
    }
    concurrency = "" if args.max_concurrency is None else f"-concurrency{args.max_concurrency}"
    name = f"{args.label or args.backend}-{rate}qps{concurrency}-{model.split('/')[-1]}"
    name = args.result_filename or f"{name}-{now:%Y%m%d-%H%M%S}.json"
    path = Path(args.result_dir or "", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n")
    except OSError as error:
        raise SystemExit(f"{path}: {os.strerror(error.errno or 0)}") from None
    return path


def _place(args: argparse.Namespace) -> tuple[str, Endpoint]:
    url = args.base_url or f"http://{args.host}:{args.port}"
    return url, endpoint_of(url, os.environ.get("OPENAI_API_KEY"))


def _model(args: argparse.Namespace, models: list[str]) -> str:
    """The model name that requests use."""
    name: str = args.served_model_name or args.model or models[0]
    return name


def _wait_ready(url: str, endpoint: Endpoint, timeout_s: float) -> list[str]:
    """Wait until the server answers; returns its models. Raises ServerError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return served_models(url, endpoint)
        except ServerError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(1.0)


def _warm_up(spec: LoadSpec, num_warmups: int) -> None:
    """Send one request like those of the run, then `num_warmups` at once. Raises ServerError."""
    print("Starting initial single prompt test run...", flush=True)
    for count in filter(None, (1, num_warmups)):
        warmup = msgspec.structs.replace(
            spec, num_requests=count, concurrency=count, request_rate=None,
            first_number=WARMUP_NUMBER + count,
        )  # fmt: skip
        (report,) = run_load(warmup, 1)
        failed = next((r.error for r in report.records if r.error is not None), None)
        if failed is not None:
            raise ServerError(f"the initial test run failed: {failed}")


def _rate(spec: LoadSpec) -> float:
    return math.inf if spec.request_rate is None else spec.request_rate


def _goals(words: list[str] | None) -> dict[str, float]:
    """Parse --goodput: metric -> limit in ms. Raises ConfigError."""
    goals = {}
    for word in words or ():
        name, _, text = word.partition(":")
        try:
            goals[name] = float(text)
        except ValueError:
            goals[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not 0.0 <= goals[name] < math.inf:
            raise ConfigError(f"--goodput takes ttft, tpot or e2el with ms: ttft:200, got {word}")
    return goals


def _percentiles(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _spec(args: argparse.Namespace, url: str) -> LoadSpec:
    """The load that the flags describe. Raises ConfigError naming the flag at fault."""
    _check(args)
    is_chat = BACKENDS[args.backend] or args.endpoint.endswith("/chat/completions")
    spread = args.random_range_ratio
    prefix_len = args.random_prefix_len
    lengths = [
        (max(1, math.floor(n * (1 - spread))), max(1, math.ceil(n * (1 + spread))))
        for n in (args.random_input_len, args.random_output_len)
    ]
    prompts: tuple[str, ...] = ()
    if args.dataset_name == "custom":
        prompts = _prompts(args.dataset_path)
        output_len = args.custom_output_len
        lengths = [(1, 1), (output_len, output_len)]
    (low, high), output = lengths
    body = {} if args.temperature is None else {"temperature": args.temperature}
    rate = None if math.isinf(args.request_rate) else args.request_rate
    return LoadSpec(
        url=url,
        models=(),
        api_key=os.environ.get("OPENAI_API_KEY"),
        is_chat=is_chat,
        input_len=(low + prefix_len, high + prefix_len),
        output_len=output,
        shared_prefix_len=prefix_len,
        vocab_size=args.vocab_size,
        prompts=prompts,
        num_requests=args.num_prompts,
        concurrency=min(args.max_concurrency or args.num_prompts, args.num_prompts),
        request_rate=rate,
        burstiness=args.burstiness,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        extra_body=body | _extra_body(args.extra_body),
        timeout_s=args.request_timeout,
    )


def _check(args: argparse.Namespace) -> None:
    for name, low in (
        ("num_prompts", 1), ("random_input_len", 1), ("random_output_len", 1),
        ("random_prefix_len", 0), ("custom_output_len", 1), ("num_warmups", 0), ("vocab_size", 2),
        ("max_concurrency", 1),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not args.request_rate > 0 or not 0 < args.burstiness < math.inf:
        raise ConfigError("--request-rate and --burstiness must be above 0")
    if not 0 <= args.random_range_ratio < 1:
        raise ConfigError(f"--random-range-ratio must be in [0, 1), got {args.random_range_ratio}")
    if args.max_concurrency is not None and math.isfinite(args.request_rate):
        raise ConfigError("--max-concurrency beside --request-rate is not built yet: give one")
    if unknown := set(args.percentile_metrics.split(",")) - set(METRICS):
        raise ConfigError(f"--percentile-metrics takes {', '.join(METRICS)}, got {unknown.pop()}")
    try:
        is_right = all(0 <= percent <= 100 for percent in _percentiles(args.metric_percentiles))
    except ValueError:
        is_right = False
    if not is_right:
        raise ConfigError(f"--metric-percentiles takes 50,99, got {args.metric_percentiles}")
    if args.endpoint not in ("/v1/completions", "/v1/chat/completions"):
        raise ConfigError(f"--endpoint must be /v1/completions or /v1/chat/completions, "
                          f"got {args.endpoint[:100]}")  # fmt: skip


def _extra_body(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise ConfigError(f"--extra-body must be a JSON object, got {text[:100]}") from None


class _Prompt(msgspec.Struct):
    prompt: str


_decode_prompt = msgspec.json.Decoder(_Prompt).decode


def _prompts(path: Path | None) -> tuple[str, ...]:
    """Read a JSONL file with {"prompt": "..."} in each line. Raises ConfigError."""
    if path is None:
        raise ConfigError("--dataset-name custom needs --dataset-path FILE")
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {os.strerror(error.errno or 0)}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_decode_prompt(line).prompt)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ConfigError(
                f'--dataset-path {path}: line {number} is no {{"prompt": "..."}}'
            ) from None
    if not prompts:
        raise ConfigError(f"--dataset-path {path} is empty")
    return tuple(prompts)


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="python -m pyserve bench serve",
        description="Load on any server that speaks OpenAI's API, with vLLM's flags and figures.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="openai", help="openai-chat: chats")
    add("--base-url", metavar="URL", help="of the server; in place of host and port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--endpoint", default="/v1/completions", help="or /v1/chat/completions")
    add("--model", help="name of the model (default: the first that is served)")
    add("--served-model-name", metavar="NAME", help="what requests call it")
    add("--dataset-name", choices=("random", "custom"), default="random")
    add("--dataset-path", type=Path, metavar="FILE", help='of custom: lines of {"prompt": ...}')
    add("--random-input-len", type=int, default=1024, metavar="N")
    add("--random-output-len", type=int, default=128, metavar="N")
    add("--random-range-ratio", type=float, default=0.0, metavar="PART", help="of lengths, +-")
    add("--random-prefix-len", type=int, default=0, metavar="N", help="that all prompts share")
    add("--custom-output-len", type=int, default=256, metavar="N")
    add("--vocab-size", type=int, default=1000, metavar="N", help="random token ids are below")
    add("--num-prompts", type=int, default=1000, metavar="N")
    add("--num-warmups", type=int, default=0, metavar="N")
    add("--request-rate", type=float, default=math.inf, metavar="RPS")
    add("--burstiness", type=float, default=1.0, metavar="SHAPE", help="of gamma arrivals")
    add("--max-concurrency", type=int, metavar="N")
    add("--seed", type=int, default=0)
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=False)
    add("--temperature", type=float, help="(default: the server's)")
    add("--extra-body", default="{}", metavar="JSON", help="fields of every request")
    add("--request-timeout", type=float, default=6 * 3600.0, metavar="S")
    add("--goodput", nargs="+", metavar="NAME:MS", help="requests within ttft:, tpot:, e2el:")
    add("--percentile-metrics", default="ttft,tpot,itl", metavar="NAMES")
    add("--metric-percentiles", default="99", metavar="P")
    add("--save-result", action=argparse.BooleanOptionalAction, default=False)
    add("--save-detailed", action=argparse.BooleanOptionalAction, default=False)
    add("--result-dir", metavar="DIR")
    add("--result-filename", metavar="FILE")
    add("--label")
    add("--metadata", nargs="+", metavar="KEY=VALUE", help="for the JSON")
    add("--ready-check-timeout-sec", type=float, default=600.0, metavar="S")
    for name, has_value in IGNORED.items():
        options: dict[str, Any] = {"nargs": "?"} if has_value else {"action": "store_true"}
        add(f"--{name}", help=argparse.SUPPRESS, default=None, **options)
    return parser
