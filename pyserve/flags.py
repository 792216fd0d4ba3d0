"""The flags: what they are called, what each may say, which are not built yet or mean nothing here.

Flag names are vLLM's. A flag that is not built yet is a start error naming it, a flag that has no
meaning here is accepted with a warning, and an unknown one is an error with the nearest name.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

from pyserve import __version__, log
from pyserve.errors import ConfigError

# Flags of vLLM that a later version will have: name -> nargs.
NOT_BUILT: dict[str, int | str] = {
    "config": 1,
    "env": 1,
    "uds": 1,
    "root-path": 1,
    "allowed-origins": 1,
    "allowed-methods": 1,
    "allowed-headers": 1,
    "allow-credentials": 0,
    "ssl-keyfile": 1,
    "ssl-certfile": 1,
    "ssl-ca-certs": 1,
    "max-logprobs": 1,
    "max-queue": 1,
    "quantization": 1,
    "kv-cache-dtype": 1,
    "enable-auto-tool-choice": 0,
    "tool-call-parser": 1,
    "reasoning-parser": 1,
    "enable-reasoning": 0,
    "enable-lora": 0,
    "lora-modules": "+",
    "max-loras": 1,
    "max-lora-rank": 1,
    "pipeline-parallel-size": 1,
    "data-parallel-size": 1,
    "speculative-config": 1,
    "guided-decoding-backend": 1,
    "structured-outputs-config": 1,
    "override-generation-config": 1,
    "default-chat-template-kwargs": 1,
    "trust-request-chat-template": 0,
    "response-role": 1,
    "rope-scaling": 1,
    "rope-theta": 1,
    "hf-overrides": 1,
    "task": 1,
    "cpu-offload-gb": 1,
    "disable-sliding-window": 0,
    "max-num-partial-prefills": 1,
    "long-prefill-token-threshold": 1,
    "return-tokens-as-token-ids": 0,
    "enable-request-id-headers": 0,
    "enable-log-requests": 0,
    "enable-log-outputs": 0,
    "max-log-len": 1,
    "stream-interval": 1,
    "tokenizer-revision": 1,
    "code-revision": 1,
    "hf-config-path": 1,
    "chat-template-content-format": 1,
    "num-gpu-blocks-override": 1,
    "max-cpu-loras": 1,
    "lora-dtype": 1,
    "long-lora-scaling-factors": "+",
    "fully-sharded-loras": 0,
    "enable-lora-bias": 0,
    "speculative-model": 1,
    "num-speculative-tokens": 1,
    "ngram-prompt-lookup-max": 1,
    "ngram-prompt-lookup-min": 1,
    "spec-method": 1,
    "spec-model": 1,
    "spec-tokens": 1,
    "max-long-partial-prefills": 1,
    "tool-parser-plugin": 1,
    "reasoning-config": 1,
    "exclude-tools-when-tool-choice-none": 0,
    "enable-force-include-usage": 0,
    "enable-server-load-tracking": 0,
    "enable-tokenizer-info-endpoint": 0,
    "enable-prompt-embeds": 0,
    "limit-mm-per-prompt": 1,
    "mm-processor-kwargs": 1,
    "logprobs-mode": 1,
    "logits-processor-pattern": 1,
    "middleware": "+",
    "ssl-cert-reqs": 1,
    "enable-expert-parallel": 0,
    "otlp-traces-endpoint": 1,
    "runner": 1,
    "convert": 1,
    "prompt-adapters": "+",
    "qlora-adapter-name-or-path": 1,
}

# Flags of vLLM whose effect pyserve always has, or that steer machinery it does not have.
NO_MEANING: dict[str, int | str] = {
    "trust-remote-code": 0,  # code from a model folder is never run
    "enforce-eager": 0,
    "enable-chunked-prefill": 0,  # always on
    "enable-prompt-tokens-details": 0,  # always on
    "disable-log-requests": 0,  # prompts are never logged
    "disable-frontend-multiprocessing": 0,  # one process
    "disable-custom-all-reduce": 0,
    "disable-fastapi-docs": 0,
    "swap-space": 1,
    "num-scheduler-steps": 1,
    "preemption-mode": 1,
    "distributed-executor-backend": 1,
    "worker-use-ray": 0,
    "use-v2-block-manager": 0,
    "compilation-config": 1,
    "max-seq-len-to-capture": 1,
    "max-parallel-loading-workers": 1,
    "uvicorn-log-level": 1,
    "attention-backend": 1,
    "tokenizer-pool-size": 1,
    "tokenizer-mode": 1,
    "api-server-count": 1,
    "async-scheduling": 0,
    "num-lookahead-slots": 1,
    "scheduler-delay-factor": 1,
    "multi-step-stream-outputs": 0,
    "disable-async-output-proc": 0,
    "collect-detailed-traces": 1,
    "config-format": 1,  # config.json is the only one
    "optimization-level": 1,
    "performance-mode": 1,
    "prefix-caching-hash-algo": 1,  # a keyed 128-bit hash, and token ids are compared
    "disable-uvicorn-access-log": 0,  # there is none
    "disable-access-log-for-endpoints": 1,
    "enable-offline-docs": 0,
    "fingerprint-mode": 1,
    "h11-max-incomplete-event-size": 1,
    "h11-max-header-count": 1,
    "show-hidden-metrics-for-version": 1,
    "language-model-only": 0,  # nothing else is served
    "tokenizer-pool-type": 1,
    "tokenizer-pool-extra-config": 1,
    "ray-workers-use-nsight": 0,
}

# What a flag that is not built yet may say without asking for anything.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "kv-cache-dtype": ("auto",),
    "pipeline-parallel-size": ("1",),
    "data-parallel-size": ("1",),
    "cpu-offload-gb": ("0",),
    "response-role": ("assistant",),
    "chat-template-content-format": ("auto",),
    "stream-interval": ("1",),
    "logprobs-mode": ("raw_logprobs",),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises ConfigError naming the flag at fault."""
    argv = [canonical(word) for word in argv]
    if argv and argv[0] == "serve":
        argv = argv[1:]
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            refuse_unknown(parser, word)
        raise ConfigError(f"unexpected argument {word!r}")
    given = vars(args)
    for name in NOT_BUILT:
        value = given.pop(name, None)
        if value not in (None, False, *NEUTRAL.get(name, ())):
            raise ConfigError(f"--{name} is not built yet in pyserve {__version__}")
    for name in NO_MEANING:
        if given.pop(name, None) is not None:
            log.get_logger().warning("--%s has no meaning in pyserve and is ignored", name)
    if args.tensor_parallel_size != 1:
        raise ConfigError(
            f"--tensor-parallel-size {args.tensor_parallel_size} is not built yet, the limit is 1"
        )
    if args.positional_model is not None:
        if args.model is not None:
            raise ConfigError("the model is given twice: as an argument and with --model")
        args.model = args.positional_model
    return args


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m pyserve",
        usage="python -m pyserve [--model MODEL] [flags]",
        description="Serve a model on the OpenAI API. Without --model: the bundled demo model.",
        allow_abbrev=False,
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a folder, or a name on the hub such as org/name")
    model.add_argument("--tokenizer", help="folder or hub name of the tokenizer (the model's)")
    model.add_argument("--revision", help="branch, tag or commit on the hub")
    model.add_argument("--download-dir", type=Path, help="where downloads are kept")
    model.add_argument("--hf-token", help="access token of the hub (HF_TOKEN)")
    model.add_argument("--load-format", choices=["auto", "safetensors", "dummy"], default="auto")
    model.add_argument(
        "--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"],
        default="auto",
    )  # fmt: skip
    model.add_argument("--chat-template", help="file or text that replaces the model's template")
    model.add_argument(
        "--generation-config", default="auto",
        help="'auto': sampling defaults of the model; 'vllm': neutral ones; or a folder",
    )  # fmt: skip
    model.add_argument("--seed", type=int, default=0, help="seed of dummy weights")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: an NVIDIA card where there is one, else the CPU",
    )  # fmt: skip
    engine.add_argument(
        "--max-model-len", type=size,
        help="context in tokens, 32k and 32K work; refused where it does not fit (default: the "
        "model's, or as much of it as fits)",
    )  # fmt: skip
    engine.add_argument("--max-num-seqs", type=int, default=256, help="sequences that run at once")
    engine.add_argument(
        "--max-num-batched-tokens", type=size,
        help="per step (8192 on a card of 40 GB or more, else 2048)",
    )  # fmt: skip
    engine.add_argument("--block-size", type=int, default=16, help="tokens in a KV block")
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9,
        help="part of the card's memory, 0 to 1, that is taken, with what other processes hold; "
        "on a CPU, of the free memory",
    )  # fmt: skip
    engine.add_argument(
        "--kv-cache-memory-bytes", type=int, help="KV cache at most (default: what is left)"
    )
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True
    )
    engine.add_argument("--scheduling-policy", choices=["fcfs", "priority"], default="fcfs")
    engine.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    engine.add_argument(
        "--allow-reference-ops", action="store_true",
        help="serve with plain torch, slowly, where there is no compiler",
    )  # fmt: skip
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="0.0.0.0")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--api-key", action="append", default=[], help="(VLLM_API_KEY)")
    server.add_argument("--served-model-name", nargs="+", help="names clients may use")
    server.add_argument("--shutdown-timeout", type=float, default=30.0, help="seconds to drain")
    server.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info"
    )
    server.add_argument("--disable-log-stats", action="store_true")
    for name, nargs in {**NOT_BUILT, **NO_MEANING}.items():
        _add_silent(parser, name, nargs)
    return parser


def _add_silent(parser: argparse.ArgumentParser, name: str, nargs: int | str) -> None:
    flags = [f"--{name}"] + (["-q"] if name == "quantization" else [])
    options: dict[str, Any] = {"dest": name, "default": None, "help": argparse.SUPPRESS}
    if nargs == 0:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
    else:
        # One value, but its absence is not worth an error of its own.
        arity: dict[str, Any] = {"nargs": "?", "const": ""} if nargs == 1 else {"nargs": nargs}
        parser.add_argument(*flags, **arity, **options)


def canonical(word: str) -> str:
    """`--max_model_len=5` and `--max-model-len=5` are the same flag."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def refuse_unknown(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    name = word.partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    raise ConfigError(f"unknown flag {name}{hint}")


def size(text: str) -> int:
    """Tokens: 4096, 32k (32,000) or 32K (32,768), as vLLM reads them."""
    factor = {"k": 1000, "K": 1024}.get(text[-1:], 1)
    return int(text[:-1] if factor > 1 else text) * factor
