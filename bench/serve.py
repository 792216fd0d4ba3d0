"""Load on any server that speaks OpenAI's API: TTFT, TPOT, inter-token latency, throughput.

    python -m bench.serve --url http://localhost:8000 --input-len 128 --output-len 512 -c 64

Definitions. TTFT: request sent (open loop: its arrival due) to the first frame that carries
tokens. TPOT: (last frame - first frame) / (output tokens - 1), per request. ITL: gaps between
frames that carry tokens; where a frame holds several tokens a gap spans them all, and
"tokens/frame" says how many. Tokens are counted by the server's `usage`, never by frames.

With --continuous-usage the server counts the tokens of each frame, and "ITL (one token)" has the
gaps that ended in a frame of exactly one. A server holds a token back where it ends amid a
character; it comes with the next one, after a gap of two steps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from bench.report import (
    LATENCY_HEADER,
    environment,
    format_table,
    latency_row,
    summarize,
    write_json,
)
from bench.stub import MODEL, StubConfig, running_stub_processes
from pyserve.http_client import Endpoint, fetch
from pyserve.remote.workload import LoadSpec, WorkerReport, run_load, time_per_output_token

BUSY_LIMIT = 0.7  # a client process busier than this is measured along with the server
WARMUP_NUMBER = 2**32  # first number of the warm-up's requests
MAX_WARMUP_OUTPUT_LEN = 16


def main(argv: list[str] | None = None) -> int:
    """0: measured and every request succeeded; 1: some or all failed; 2: bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        spec = _spec(args)
    except ValueError as error:
        parser.error(str(error))
    if args.self_test:
        return _self_test(spec, args)
    try:
        server = _describe_server(spec)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    models = spec.models or (server["models"][0],)
    spec = msgspec.structs.replace(spec, models=models)
    if not _warm_up(spec, args):
        return 1
    result = measure(spec, args.processes)
    print(render(spec, result))
    _write(args.json, spec, result, server)
    return 1 if result["num_errors"] else 0


def measure(spec: LoadSpec, num_processes: int) -> dict[str, Any]:
    """Run the load; every figure of the table, in seconds and tokens."""
    return aggregate(run_load(spec, num_processes))


def aggregate(reports: list[WorkerReport]) -> dict[str, Any]:
    """Figures of one run. Failed requests count in `errors` and in the wall time, nowhere else.

    one_token_itl_s     the gaps that ended in a frame of exactly one token; None where there is
                        none, or the tokens of some frame are not known.
    longest_gap_tokens  tokens of the frame that ended the longest gap; None where not known.
    """
    records = [record for report in reports for record in report.records]
    good = [record for record in records if record.error is None]
    wall_s = max(r.ended_s for r in records) - min(r.started_s for r in records)
    num_output = sum(r.num_output_tokens for r in good)
    num_prompt = sum(r.num_prompt_tokens for r in good)
    num_frames = sum(len(r.gaps) + 1 for r in good if r.first_s is not None)
    is_counted = all(len(r.gaps) == len(r.gap_tokens) for r in good)
    gaps = [gap for r in good for gap in r.gaps]
    gap_tokens = [count for r in good for count in r.gap_tokens] if is_counted else []
    counted_gaps = list(zip(gaps, gap_tokens, strict=False))
    return {
        "wall_s": wall_s,
        "num_requests": len(records),
        "num_good": len(good),
        "num_errors": len(records) - len(good),
        "errors": dict(Counter(r.error for r in records if r.error is not None).most_common(20)),
        "num_short": sum(r.num_output_tokens < r.num_asked_tokens for r in good),
        "num_without_usage": sum(not r.has_usage for r in good),
        "num_resent": sum(report.num_resent for report in reports),
        "prompt_tokens": num_prompt,
        "cached_tokens": sum(r.num_cached_tokens for r in good),
        "output_tokens": num_output,
        "output_tokens_per_s": num_output / wall_s,
        "total_tokens_per_s": (num_output + num_prompt) / wall_s,
        "requests_per_s": len(good) / wall_s,
        "tokens_per_frame": num_output / num_frames if num_frames else None,
        "ttft_s": summarize([r.first_s - r.started_s for r in good if r.first_s is not None]),
        "tpot_s": summarize([tpot for r in good if (tpot := time_per_output_token(r)) is not None]),
        "itl_s": summarize(gaps),
        "one_token_itl_s": summarize([gap for gap, count in counted_gaps if count == 1]),
        "longest_gap_tokens": max(counted_gaps)[1] if counted_gaps else None,
        "e2e_s": summarize([r.ended_s - r.started_s for r in good]),
        "client_busy": [report.cpu_s / report.wall_s for report in reports],
        "client_cpu_s": sum(report.cpu_s for report in reports),
        "max_late_s": max(r.late_s for r in records),
    }


def render(spec: LoadSpec, result: dict[str, Any]) -> str:
    """The tables and the remarks without which they would mislead."""
    loop = f"concurrency {spec.concurrency}"
    if spec.request_rate is not None:
        loop = f"{spec.request_rate:g} requests/s (Poisson)"
    one_token_rows = []
    if result["longest_gap_tokens"] is not None:
        one_token_rows.append(latency_row("ITL (one token)", result["one_token_itl_s"]))
    lines = [
        f"{', '.join(spec.models)}: in/out {_range(spec.input_len)}/{_range(spec.output_len)}, "
        f"{loop}, {result['num_requests']} requests, {len(result['client_busy'])} client "
        f"processes, seed {spec.seed}",
        "",
        format_table(
            [
                ["throughput", ""],
                ["output tok/s", f"{result['output_tokens_per_s']:,.1f}"],
                ["total tok/s", f"{result['total_tokens_per_s']:,.1f}"],
                ["requests/s", f"{result['requests_per_s']:.3f}"],
                ["wall s", f"{result['wall_s']:.2f}"],
                ["output tokens", f"{result['output_tokens']:,}"],
                ["prompt tokens", f"{result['prompt_tokens']:,}"],
                ["  of them cached", f"{result['cached_tokens']:,}"],
                ["tokens/frame", f"{result['tokens_per_frame'] or 0:.2f}"],
                ["errors", str(result["num_errors"])],
                ["client busy, max", f"{max(result['client_busy']):.0%}"],
            ]
        ),
        "",
        format_table(
            [
                LATENCY_HEADER,
                latency_row("TTFT", result["ttft_s"]),
                latency_row("TPOT", result["tpot_s"]),
                latency_row("ITL (frame gaps)", result["itl_s"]),
                *one_token_rows,
                latency_row("request", result["e2e_s"]),
            ]
        ),
        *_remarks(spec, result),
    ]
    return "\n".join(lines)


def _remarks(spec: LoadSpec, result: dict[str, Any]) -> list[str]:
    remarks = [f"error x{count}: {text}" for text, count in result["errors"].items()]
    if result["num_short"]:
        remarks.append(f"{result['num_short']} answers are shorter than asked for")
    if result["num_without_usage"]:
        remarks.append(
            f"{result['num_without_usage']} answers came without usage: their tokens are counted "
            "by frames, a lower bound"
        )
    if spec.has_continuous_usage and result["itl_s"] and result["longest_gap_tokens"] is None:
        remarks.append("the server did not count the tokens of every frame: no ITL of one token")
    if result["num_resent"]:
        remarks.append(f"{result['num_resent']} requests sent again: a kept connection was closed")
    if (result["tokens_per_frame"] or 0) > 1.05:
        remarks.append("frames hold several tokens: an ITL gap spans them; TPOT is per token")
    if max(result["client_busy"]) > BUSY_LIMIT:
        remarks.append("a client process was busy: the figures are its limit too; --processes")
    if spec.request_rate is not None and result["max_late_s"] > 0.01:
        remarks.append(f"the client sent up to {result['max_late_s'] * 1e3:.0f} ms late (counted)")
    return ["", *(f"! {remark}" for remark in remarks)] if remarks else []


def _warm_up(spec: LoadSpec, args: argparse.Namespace) -> bool:
    """Short requests of the same prompts' shape, other tokens. False where all of them fail."""
    count = min(spec.concurrency, 16) if args.warmup is None else args.warmup
    if count == 0:
        return True
    low, high = (min(length, MAX_WARMUP_OUTPUT_LEN) for length in spec.output_len)
    warmup = msgspec.structs.replace(
        spec,
        num_requests=count,
        concurrency=count,
        output_len=(low, high),
        request_rate=None,
        first_number=WARMUP_NUMBER,
    )
    result = measure(warmup, 1)
    for text, number in result["errors"].items():
        print(f"warm-up error x{number}: {text}", file=sys.stderr)
    return bool(result["num_good"])


def _self_test(spec: LoadSpec, args: argparse.Namespace) -> int:
    """The client's own ceiling, against stub processes on the same cores."""
    count = args.processes
    spec = msgspec.structs.replace(spec, models=(MODEL,), api_key=None)
    with running_stub_processes(count, StubConfig()) as url:
        spec = msgspec.structs.replace(spec, url=url)
        result = measure(spec, count)
    print(render(spec, result))
    frames = result["output_tokens"] / (result["tokens_per_frame"] or 1)
    cost_s = result["client_cpu_s"] / frames
    print(
        f"\nclient: {cost_s * 1e6:.1f} us of CPU per frame, so {count} processes on cores of their "
        f"own read about {count / cost_s:,.0f} frames/s;\nhere, with {count} stub processes on "
        f"the same {len(os.sched_getaffinity(0))} cores, "
        f"{result['output_tokens_per_s']:,.0f} tok/s"
    )
    _write(args.json, spec, {**result, "client_cpu_s_per_frame": cost_s}, {"version": "stub"})
    return 1 if result["num_errors"] else 0


def _describe_server(spec: LoadSpec) -> dict[str, Any]:
    """Its models and version. RuntimeError with one line where it does not answer."""
    endpoint = Endpoint.parse(spec.url, spec.api_key)
    listing = asyncio.run(fetch(endpoint, "/v1/models"))
    if listing.error is not None:
        raise RuntimeError(f"{spec.url}/v1/models: {listing.error}")
    models = [entry["id"] for entry in msgspec.json.decode(listing.body)["data"]]
    if not models:
        raise RuntimeError(f"{spec.url}/v1/models lists no model")
    version = asyncio.run(fetch(endpoint, "/version"))
    text = version.body.decode("utf-8", "replace")[:200] if version.error is None else None
    return {"models": models, "version": text}


def _write(
    path: Path | None, spec: LoadSpec, result: dict[str, Any], server: dict[str, Any]
) -> None:
    config = {**msgspec.to_builtins(spec), "api_key": None}
    about = environment(["numpy", "msgspec"])
    write_json(path, {"config": config, "environment": about, "server": server, "result": result})


def _range(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}"


def _length(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    pair = (int(low), int(high or low))
    if not 1 <= pair[0] <= pair[1]:
        raise argparse.ArgumentTypeError(f"want N or MIN:MAX with 1 <= MIN <= MAX, got {text}")
    return pair


def _spec(args: argparse.Namespace) -> LoadSpec:
    """ValueError names the flag at fault."""
    if args.concurrency < 1:
        raise ValueError(f"--concurrency must be at least 1, got {args.concurrency}")
    if args.request_rate is not None and not args.request_rate > 0:
        raise ValueError(f"--request-rate must be above 0, got {args.request_rate}")
    if args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}")
    num_requests = args.num_requests
    if num_requests is None:
        num_requests = max(3, 2 * args.concurrency)
    if num_requests < 1:
        raise ValueError(f"--num-requests must be at least 1, got {num_requests}")
    return LoadSpec(
        url=args.url,
        models=tuple(args.model or ()),
        api_key=args.api_key,
        is_chat=args.chat,
        is_text=args.text,
        input_len=args.input_len,
        output_len=args.output_len,
        shared_prefix_len=args.shared_prefix_len,
        vocab_size=args.vocab_size,
        num_requests=num_requests,
        concurrency=args.concurrency,
        request_rate=args.request_rate,
        seed=secrets.randbelow(2**31) if args.seed is None else args.seed,
        ignore_eos=not args.no_ignore_eos,
        has_continuous_usage=args.continuous_usage,
        temperature=args.temperature,
        extra_body=msgspec.json.decode(args.extra_body, type=dict[str, Any]),
        timeout_s=args.timeout_s,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://localhost:8000", help="server address (default %(default)s)")
    add("--model", nargs="+", help="model name; of several, one is drawn per request")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    add("--chat", action="store_true", help="/v1/chat/completions; lengths are words")
    add("--text", action="store_true", help="text instead of token ids; lengths are words")
    add("--input-len", type=_length, default=(128, 128), metavar="N|MIN:MAX")
    add("--output-len", type=_length, default=(128, 128), metavar="N|MIN:MAX")
    add("--shared-prefix-len", type=int, default=0, help="tokens all prompts begin with")
    add("--vocab-size", type=int, default=32000, help="prompt ids are below (default %(default)s)")
    add("-n", "--num-requests", type=int, help="default: 2 per slot, at least 3")
    add("-c", "--concurrency", type=int, default=1, help="closed loop: slots")
    add("--request-rate", type=float, help="open loop: Poisson arrivals a second, no slots")
    add("--warmup", type=int, help="requests before the run (default: one per slot, at most 16)")
    add("--seed", type=int, help="default: drawn, so that no prefix cache knows the prompts")
    add("--no-ignore-eos", action="store_true")
    add("--continuous-usage", action="store_true", help="have the tokens of each frame counted")
    add("--temperature", type=float, default=0.0)
    add("--extra-body", default="{}", metavar="JSON", help="fields added to every request")
    add("--timeout-s", type=float, default=600.0, help="per request; counted as an error")
    add("--processes", type=int, default=min(4, len(os.sched_getaffinity(0))))
    add("--self-test", action="store_true", help="measure this client against a stub instead")
    add("--json", type=Path, metavar="FILE", help="write config, environment and figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
