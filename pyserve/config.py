"""Settings of one server, and the only reader of the environment.

Config objects are frozen before anything is built. Derived numbers (num_blocks, the context that
fits) are never written back to them: whoever computes such numbers passes them on.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pyserve.errors import ConfigError
from pyserve.flag_rows import (
    ADAPTERS,
    BATCHES,
    REQUESTS,
    LoraModule,
    assignment,
    context,
    flag,
    json_object,
    key,
    lora_module,
    optional_size,
    quantization,
    rows_of,
    size,
    url_prefix,
)
from pyserve.limits import TOP_LOGPROBS
from pyserve.params import INT64_MAX, INT64_MIN

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
LoraDtype = Literal["auto", "float16", "bfloat16", "float32"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Quantized = Literal["awq", "gptq", "compressed-tensors", "fp8"]
LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
Policy = Literal["fcfs", "priority"]
Runner = Literal["auto", "generate", "pooling", "embed", "score"]
Convert = Literal["auto", "none", "embed", "classify"]
Use = Runner
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

DEFAULT_LORAS = 8
TP_SIZES = (1, 2, 4, 8)  # ranks that may share each layer, on one machine
MAX_BODY_BYTES = 32 * 2**20
MAX_QUEUE = 2**20
ALL = ("*",)
UNNAMED = "key-"  # prefix, before a number, of users whose key has no name
HALVES = {"half": "float16", "float": "float32"}  # further values of --dtype
TASKS = {"embedding": "embed", "classify": "score"}  # values of --task, --runner's old name
DEMO_MODEL = Path(__file__).parent / "demo"

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^\s/,]+", re.IGNORECASE)
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")
# A key from `openssl rand -base64 32` ends in "=", but the rest of it is not a name.
_PADDED_BASE64 = re.compile(r"([A-Za-z0-9+/_-]{4}){5,}[A-Za-z0-9+/_-]{2}[A-Za-z0-9+/_=-]=")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What the command line uses itself: the places of the model and its texts, and the log level.

    None means for model: the demo model; for tokenizer and chat_template: the model's own; for
    hf_token: that of the environment, or the one that `hf auth login` has stored, if there is one.
    hf_token True: there must be one.
    """

    GROUP = "model"

    config: Path | None = flag(None, "YAML of flags: 'port: 8000'; flags given win", group="")
    env: tuple[tuple[str, str], ...] = flag(
        (), "set a variable of the environment; repeatable", "", group="", metavar="KEY=VALUE",
        read=assignment, options={"action": "append"},
    )  # fmt: skip
    model: str | None = flag(
        None, "a folder, or a name on the hub: org/name", "the demo model", read=str
    )
    tokenizer: str | None = flag(
        None, "folder or hub name of the tokenizer", "the model's", metavar="MODEL"
    )
    revision: str | None = flag(None, "branch, tag or commit on the hub", "main", metavar="REV")
    download_dir: Path | None = flag(None, "where downloads are kept", "HF_HOME", metavar="DIR")
    hf_token: str | bool | None = flag(
        None, "access token of the hub", "HF_TOKEN, or hf auth login's", metavar="TOKEN",
        options={"nargs": "?", "const": True},
    )  # fmt: skip
    chat_template: str | None = flag(
        None, "file or text of another chat template", "model's", metavar="FILE"
    )
    generation_config: str = flag(
        "auto", "sampling: auto: as the model says; vllm: none; a folder", metavar="FROM",
        read=str,
    )  # fmt: skip
    log_level: LogLevel = flag(
        "info", "debug, info, warning, error or critical", group=REQUESTS, metavar="LEVEL",
        read=str.lower,
    )  # fmt: skip

    @property
    def token(self) -> str | bool | None:
        """The token for the hub: hf_token, or that of the environment."""
        return self.hf_token or env("HF_TOKEN") or env("HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine is built from. Sizes are in tokens unless the name says otherwise.

    model_path   a folder with config.json and, unless load_format is dummy, safetensors
    answer_ids   ids of the tokens whose logits make a score; (): the model does not name any

    None means for max_model_len: the model's own, or what fits; for max_num_batched_tokens and
    kv_cache_memory_bytes: what planner.py chooses; for max_queue, the number of sequences that may
    wait: 4 * max_num_seqs, and at least 4096 where they are pooled.
    """

    GROUP = "engine"

    model_path: Path
    load_format: LoadFormat = flag(
        "auto", "auto, safetensors or dummy: random weights", group="model", metavar="FORMAT"
    )
    dtype: Dtype = flag(
        "auto", "auto, float16, bfloat16 or float32", group="model", metavar="TYPE", synonyms=HALVES
    )
    quantization: Quantized | None = flag(
        None, "awq or fp8 (of any model), gptq, compressed-tensors",
        "model's", group="model", metavar="METHOD", read=quantization, short="-q",
    )  # fmt: skip
    runner: Runner = flag(
        "auto", "what it is for: generate, pooling, embed or score", group="model",
        metavar="USE", synonyms=TASKS, also="task",
    )  # fmt: skip
    convert: Convert = flag(
        "auto", "of one that generates: embed or classify", group="model",
        metavar="USE",
    )  # fmt: skip
    seed: int = flag(0, "of dummy weights", group="model", limits=(INT64_MIN, INT64_MAX))
    device: Device = flag("auto", "auto, cpu or cuda; auto: a card where there is one")
    max_model_len: int | None = flag(
        None, "context: 4096, 32k", "what fits", read=context, limits=(1, 2**24)
    )
    gpu_memory_utilization: float = flag(
        0.9, "of the card's memory, others' use included", metavar="PART",
        also="device-memory-utilization",
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = flag(
        None, "KV cache at most: 4G (4 GiB)", "what is left", read=optional_size, limits=(1, 2**50)
    )
    max_num_seqs: int = flag(256, "run at once", limits=(1, 4096))
    max_num_batched_tokens: int | None = flag(
        None, "a step;", "8192 on a card of 40 GB or more, else 2048", read=size, limits=(1, 2**20)
    )
    target_itl_ms: int = flag(
        36, "a step with prompts may take while answers run; 0: any", metavar="MS",
        limits=(0, 60_000),
    )  # fmt: skip
    block_size: int = flag(16, "tokens in a KV block", limits=(1, 256))
    logprobs_mode: LogprobsMode = flag(
        "raw_logprobs", "raw_ or processed_ (CPU), logprobs or logits", metavar="MODE"
    )
    enable_prefix_caching: bool = flag(True, "do not keep what prompts have in common", "kept")
    scheduling_policy: Policy = flag(
        "fcfs", "fcfs: first come first served; or priority", metavar="POLICY"
    )
    tensor_parallel_size: int = flag(
        1, "cards that share each layer: 1, 2, 4 or 8", short="-tp", limits=(1, 8)
    )  # fmt: skip
    pipeline_parallel_size: int = flag(
        1, "ranks with a run of layers each, under torchrun", short="-pp", limits=(1, 256)
    )  # fmt: skip
    allow_reference_ops: bool = flag(False, "serve slowly, by plain torch, without a compiler")
    enforce_eager: bool = flag(False, "no CUDA graphs: every step is launched op by op")
    enable_lora: bool = flag(False, "serve LoRA adapters too", group=ADAPTERS)
    lora_modules: tuple[LoraModule, ...] = flag(
        (), "NAME=PATH or JSON: adapters from the start", "none", group=ADAPTERS, metavar="MODULE",
        read=lora_module, options={"nargs": "+"},
    )  # fmt: skip
    lora_dir: Path | None = flag(
        None, "its folders are adapters, by their names", "none", group=ADAPTERS, metavar="DIR"
    )
    max_loras: int | None = flag(
        None, "different ones in a step", "as --lora-modules, 1 to 8", group=ADAPTERS,
        metavar="N", read=optional_size, limits=(1, 256),
    )  # fmt: skip
    max_lora_rank: int = flag(16, "their rank at most", group=ADAPTERS, limits=(1, 512))
    max_cpu_loras: int | None = flag(
        None, "kept in the host's memory", "8, or more to hold all of those", group=ADAPTERS,
        metavar="N", read=optional_size, limits=(1, 4096),
    )  # fmt: skip
    lora_dtype: LoraDtype = flag(
        "auto", "auto, or what the model is served in", group=ADAPTERS, metavar="TYPE"
    )
    trace: Path | None = flag(
        None, "write what steps take as a Chrome trace", metavar="FILE", shown="no trace"
    )
    max_queue: int | None = flag(
        None, "wait at most, then 429", "4 x --max-num-seqs", group=REQUESTS, limits=(1, MAX_QUEUE)
    )

    idle_sleep_min: float = flag(
        0.0, "minutes without work, then asleep; 0: never",
        name="idle-sleep", metavar="MIN", limits=(0, 10**6),
    )  # fmt: skip
    answer_ids: tuple[int, ...] = ()

    @property
    def use(self) -> Use:
        """What the model is to be used for: runner, unless convert says it."""
        converted: dict[Convert, Use] = {"embed": "embed", "classify": "score"}
        return converted.get(self.convert, self.runner)

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.convert in ("embed", "classify") and self.runner == "generate":
            raise ConfigError(f"--convert {self.convert} contradicts --runner generate")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size must be a power of two, got {self.block_size}")
        if self.tensor_parallel_size not in TP_SIZES:
            raise ConfigError(
                f"--tensor-parallel-size must be 1, 2, 4 or 8, got {self.tensor_parallel_size}"
            )
        if self.tensor_parallel_size > 1 and self.pipeline_parallel_size > 1:
            raise ConfigError(
                f"--tensor-parallel-size {self.tensor_parallel_size} with --pipeline-parallel-size "
                f"{self.pipeline_parallel_size} is not built yet: one of them must be 1"
            )
        names = [module.name for module in self.lora_modules]
        if (names or self.lora_dir is not None) and not self.enable_lora:
            flag_name = "--lora-modules" if names else "--lora-dir"
            raise ConfigError(f"{flag_name} needs --enable-lora")
        if len(set(names)) < len(names):
            raise ConfigError(f"--lora-modules must name each adapter once, got {', '.join(names)}")
        if self.num_kept_adapters < self.num_adapter_slots:
            raise ConfigError(
                f"--max-cpu-loras must be at least --max-loras {self.num_adapter_slots}, got "
                f"{self.max_cpu_loras}"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )

    @property
    def num_ranks(self) -> int:
        """Number of processes that serve the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def has_graphs(self) -> bool:
        """Whether small steps are captured as CUDA graphs on a GPU; not in a pipeline."""
        return not self.enforce_eager and self.pipeline_parallel_size == 1

    @property
    def num_adapter_slots(self) -> int:
        """Number of different adapters that may run at once; 0: none is served."""
        if not self.enable_lora:
            return 0
        return self.max_loras or min(max(len(self.lora_modules), 1), DEFAULT_LORAS)

    @property
    def num_kept_adapters(self) -> int:
        """Number of adapters that are kept in host memory."""
        default = max(DEFAULT_LORAS, self.num_adapter_slots, len(self.lora_modules))
        return self.max_cpu_loras or default


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the HTTP side is built from. Responses use the first of served_model_names."""

    GROUP = "server"

    host: str = flag("0.0.0.0", "address to listen on", metavar="HOST")
    port: int = flag(8000, "0: any that is free", metavar="PORT", limits=(0, 65535))
    uds: Path | None = flag(None, "a Unix socket in place of host and port", metavar="PATH")
    ssl_certfile: Path | None = flag(None, "serve TLS with this chain (PEM)")
    ssl_keyfile: Path | None = flag(None, "its key, no password", "in the chain")
    api_keys: tuple[str, ...] = flag(
        (), "clients must send one; NAME=KEY: use by name", "VLLM_API_KEY", name="api-key",
        metavar="KEY", read=key, options={"action": "append", "nargs": "+"},
    )  # fmt: skip
    share_prefix_cache: bool = flag(
        False, "of several keys: one cache of prompts for all", "each its own"
    )
    served_model_names: tuple[str, ...] = flag(
        MISSING, "what clients may call the model", "what --model says", name="served-model-name",
        metavar="NAME", read=str, options={"nargs": "+"},
    )  # fmt: skip
    root_path: str = flag(
        "", "prefix that a proxy leaves on, as /llm", "", metavar="PATH", read=url_prefix
    )
    allowed_origins: tuple[str, ...] = flag(ALL, "CORS: list of web pages")
    allowed_methods: tuple[str, ...] = flag(ALL, "CORS: list of methods")
    allowed_headers: tuple[str, ...] = flag(ALL, "CORS: list of headers")
    allow_credentials: bool = flag(False, "CORS: cookies too; needs named origins")
    ready_file: Path | None = flag(None, "exists while the server is ready")
    shutdown_timeout_s: float = flag(30.0, "for requests to finish at the end")
    request_timeout_s: float = flag(3600.0, "a request takes at most, 0: any time", group=REQUESTS)
    trust_request_chat_template: bool = flag(
        False, "run templates that requests bring", group=REQUESTS
    )
    reasoning_parser: str | None = flag(
        None, "thinking apart: deepseek_r1, qwen3, mistral, ...", group=REQUESTS, metavar="NAME"
    )
    enable_auto_tool_choice: bool = flag(
        False, "let the model decide to call tools", group=REQUESTS
    )
    tool_call_parser: str | None = flag(
        None, "how it writes calls: hermes, mistral, llama3_json, ...", "none", group=REQUESTS,
        metavar="NAME",
    )  # fmt: skip
    default_chat_template_kwargs: Mapping[str, Any] | None = flag(
        None, "of every chat: '{\"enable_thinking\": false}'", group=REQUESTS, metavar="{}",
        read=json_object,
    )  # fmt: skip
    response_store_bytes: int = flag(
        2**28, "stored responses, in all; 0: none is stored", "256M",
        name="response-store-size", group=REQUESTS, metavar="SIZE", read=size, limits=(0, 2**40),
    )  # fmt: skip
    response_store_age_s: float = flag(
        86400.0, "a stored one is kept since it was used", group=REQUESTS
    )
    max_logprobs: int = flag(
        TOP_LOGPROBS, "most likely tokens a request may ask for", group=REQUESTS,
        limits=(0, TOP_LOGPROBS),
    )  # fmt: skip
    return_tokens_as_token_ids: bool = flag(
        False, "logprobs name tokens by id: token_id:5", group=REQUESTS
    )
    batch_dir: Path | None = flag(
        None, "keep files and batches of clients in this folder", "no batches", group=BATCHES,
        metavar="DIR",
    )  # fmt: skip
    batch_max_file_bytes: int = flag(
        200 * 2**20, "of one file: 200M", "200M", group=BATCHES, read=size, limits=(1, 2**40),
    )  # fmt: skip
    batch_max_total_bytes: int = flag(
        10 * 2**30, "of all files and batches", "10G", group=BATCHES, read=size, limits=(1, 2**50),
    )  # fmt: skip
    batch_max_inflight: int | None = flag(
        None, "lines that are asked at once", "--max-num-seqs", group=BATCHES, limits=(1, 4096)
    )
    log_requests: bool = flag(
        False, "a line for each request's parameters, never texts", name="enable-log-requests",
        group=REQUESTS,
    )  # fmt: skip
    log_stats: bool = flag(
        True, "no line of statistics every 10 s", name="disable-log-stats", group=REQUESTS,
        is_negated=True,
    )  # fmt: skip
    max_body_bytes: int = MAX_BODY_BYTES

    def __post_init__(self) -> None:
        _check_limits(self)
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("--served-model-name must hold at least one non-empty name")
        for name in self.served_model_names:
            if not name.isprintable():
                raise ConfigError(f"--served-model-name {name!r} must be of printable characters")
        named_keys(self.api_keys)
        for name, seconds in (
            ("--shutdown-timeout", self.shutdown_timeout_s),
            ("--request-timeout", self.request_timeout_s),
            ("--response-store-age", self.response_store_age_s),
        ):
            if not 0.0 <= seconds < math.inf:
                raise ConfigError(f"{name} must be at least 0 seconds, got {seconds}")
        if not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"--root-path must be a path such as /llm, got {self.root_path!r}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError("--enable-auto-tool-choice needs --tool-call-parser")
        self._check_cors()

    def _check_cors(self) -> None:
        for name, values, form, example in (
            ("--allowed-origins", self.allowed_origins, _ORIGIN, "https://example.org"),
            ("--allowed-methods", self.allowed_methods, _TOKEN, "POST"),
            ("--allowed-headers", self.allowed_headers, _TOKEN, "Authorization"),
        ):
            for value in values:
                if value != "*" and not form.fullmatch(value):
                    raise ConfigError(f'{name} must list "*" or such as {example}, got {value!r}')
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError(
                "--allow-credentials needs --allowed-origins that names the origins instead of *"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What `run-batch` reads and writes.

    None means for max_inflight: a quarter more than max_num_seqs; for output_tmp_dir: the folder of
    the output.
    """

    GROUP = "batch"

    input_file: Path = flag(MISSING, "JSONL of requests", "", short="-i")
    output_file: Path = flag(MISSING, "JSONL of answers, in the same order", "", short="-o")
    max_inflight: int | None = flag(
        None, "lines that are asked at once", "5/4 of --max-num-seqs", limits=(1, 4096)
    )
    output_tmp_dir: Path | None = flag(
        None, "where answers gather until all are there", "that of -o", metavar="DIR"
    )
    enable_metrics: bool = flag(False, "serve on --host and --port meanwhile, for /metrics")

    def __post_init__(self) -> None:
        _check_limits(self)


def named_keys(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(user, key) of each value of --api-key.

    A value is NAME=KEY, or a KEY alone, whose user is "key-" and its position, counted from 1. A
    name may have several keys. Raises ConfigError, which never shows a key.
    """
    found: dict[str, str] = {}
    for place, word in enumerate(words, 1):
        user, key, shown = f"{UNNAMED}{place}", word, f"--api-key, value {place}:"
        if "=" in word and not _PADDED_BASE64.fullmatch(word):
            user, _, key = word.partition("=")
            if not _KEY_NAME.fullmatch(user) or user.startswith(UNNAMED):
                raise ConfigError(
                    f"{shown} NAME=KEY needs a name of 1 to 32 letters, digits, '.', '_' and '-' "
                    f"that does not begin with {UNNAMED}; a key that holds '=' needs a name too"
                )
            shown = f"--api-key {user}=...:"
        if not key:
            raise ConfigError(f"{shown} the key must not be empty")
        if key != key.strip():
            # HTTP headers are stripped of white space, so no client could ever send this key.
            raise ConfigError(f"{shown} the key must not begin or end with white space")
        other = found.setdefault(key, user)
        if other != user and not (other.startswith(UNNAMED) and user.startswith(UNNAMED)):
            raise ConfigError(f"{shown} {other} has the same key; each name needs one of its own")
    return tuple((user, key) for key, user in found.items())


def env(name: str) -> str | None:
    """Value of an environment variable; None where it is unset or empty."""
    return os.environ.get(name) or None


class Launched(NamedTuple):
    """What torchrun tells each process that it starts.

    local_index  index of this process among those on its machine.
    """

    tp_rank: int
    tp_size: int
    local_index: int


def launched() -> Launched | None:
    """This process's place among those of torchrun; None if torchrun has not started it.

    Raises ConfigError.
    """
    if env("TORCHELASTIC_RUN_ID") is None:
        return None
    words = [env(name) or "" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {words}")
    return Launched(*map(int, words))


def cache_dir() -> Path:
    """The folder of compiled libraries: PYSERVE_CACHE, else `pyserve` in the XDG cache folder."""
    override = env("PYSERVE_CACHE")
    if override is not None:
        return Path(override)
    return Path(env("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyserve"


def _check_limits(config: LaunchConfig | EngineConfig | ServerConfig | BatchConfig) -> None:
    config_class: Any = type(config)
    for field, row in rows_of(config_class).items():
        value = getattr(config, field)
        if row.limits is not None and value is not None:
            low, high = row.limits
            if not low <= value <= high:
                raise ConfigError(f"--{row.name} must be in [{low}, {high}], got {value}")
