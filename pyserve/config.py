"""Settings of one server, frozen before anything is built, and the only reader of the environment.

Derived numbers (num_blocks, the context that fits) are never written back here: whoever computes
them passes them on.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Literal

import msgspec

from pyserve.errors import ConfigError
from pyserve.params import INT64_MAX, INT64_MIN

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "dummy"]

MAX_BODY_BYTES = 32 * 2**20
DEFAULT_BLOCK_SIZE = 16
DEFAULT_HOST, DEFAULT_PORT = "0.0.0.0", 8000
MAX_QUEUE = 2**20
DEMO_MODEL = Path(__file__).parent / "demo"

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^\s/,]+", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is built from. Sizes are tokens unless the name says otherwise."""

    model_path: Path  # a folder with config.json and, unless load_format is dummy, safetensors
    dtype: Dtype = "auto"
    device: Device = "auto"  # auto: an NVIDIA card where there is one
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None  # None: the model's own, or what fits
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # None: what suits the device, see planner.py
    block_size: int = DEFAULT_BLOCK_SIZE
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9  # fraction of the device's memory; the host's on a CPU
    kv_cache_memory_bytes: int | None = None  # overrides what the planner would give the KV cache
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    max_queue: int | None = None  # sequences that wait; None: 4 * max_num_seqs
    seed: int = 0
    allow_reference_ops: bool = False

    def __post_init__(self) -> None:
        _require("--max-num-seqs", self.max_num_seqs, 1, 4096)
        if self.max_num_batched_tokens is not None:
            _require("--max-num-batched-tokens", self.max_num_batched_tokens, 1, 2**20)
        _require("--block-size", self.block_size, 1, 256)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size must be a power of two, got {self.block_size}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.max_model_len is not None:
            _require("--max-model-len", self.max_model_len, 1, 2**24)
        if self.kv_cache_memory_bytes is not None:
            _require("--kv-cache-memory-bytes", self.kv_cache_memory_bytes, 1, 2**50)
        _require("--seed", self.seed, INT64_MIN, INT64_MAX)
        if self.max_queue is not None:
            _require("--max-queue", self.max_queue, 1, MAX_QUEUE)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side is built from."""

    served_model_names: tuple[str, ...]  # the first one is used in responses
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    shutdown_timeout_s: float = 30.0
    log_stats: bool = True
    uds: Path | None = None  # a Unix socket instead of host and port
    root_path: str = ""  # path prefix that a proxy may leave on, such as /llm
    allowed_origins: tuple[str, ...] = ("*",)  # of web pages that may call the API
    allowed_methods: tuple[str, ...] = ("*",)  # of their requests
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    ready_file: Path | None = None  # written when the server is ready, gone when it is not
    request_timeout_s: float = 3600.0  # 0: none
    log_requests: bool = False  # parameters and token counts of each request, never texts
    trust_request_chat_template: bool = False
    share_prefix_cache: bool = False  # among several api_keys

    def __post_init__(self) -> None:
        _require("--port", self.port, 0, 65535)
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("--served-model-name must hold at least one non-empty name")
        for name in self.served_model_names:
            if not name.isprintable():  # nor could a response hold it
                raise ConfigError(f"--served-model-name {name!r} must be of printable characters")
        if any(not key for key in self.api_keys):
            raise ConfigError("--api-key must not be empty")
        if any(key != key.strip() for key in self.api_keys):
            # Headers are stripped of it, so that no client could ever match.
            raise ConfigError("--api-key must not begin or end with white space")
        if not 0.0 <= self.shutdown_timeout_s < math.inf:
            raise ConfigError(
                f"--shutdown-timeout must be at least 0 seconds, got {self.shutdown_timeout_s}"
            )
        if not 0.0 <= self.request_timeout_s < math.inf:
            raise ConfigError(
                f"--request-timeout must be at least 0 seconds, got {self.request_timeout_s}"
            )
        if not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"--root-path must be a path such as /llm, got {self.root_path!r}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        self._check_cors()

    def _check_cors(self) -> None:
        for flag, values, form, example in (
            ("--allowed-origins", self.allowed_origins, _ORIGIN, "https://example.org"),
            ("--allowed-methods", self.allowed_methods, _TOKEN, "POST"),
            ("--allowed-headers", self.allowed_headers, _TOKEN, "Authorization"),
        ):
            for value in values:
                if value != "*" and not form.fullmatch(value):
                    raise ConfigError(f'{flag} must list "*" or such as {example}, got {value!r}')
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError(
                "--allow-credentials needs --allowed-origins that names the origins instead of *"
            )


def env(name: str) -> str | None:
    """Value of an environment variable; None where it is unset or empty."""
    return os.environ.get(name) or None


def cache_dir() -> Path:
    """Where compiled products are kept: PYSERVE_CACHE, else the XDG cache folder."""
    override = env("PYSERVE_CACHE")
    if override is not None:
        return Path(override)
    return Path(env("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyserve"


def _require(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag} must be in [{low}, {high}], got {value}")
