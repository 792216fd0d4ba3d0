"""Settings refuse what cannot be served and name the flag."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pyserve.config import EngineConfig, ServerConfig, cache_dir
from pyserve.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("max_num_seqs", 0, "--max-num-seqs"),
        ("max_num_batched_tokens", 0, "--max-num-batched-tokens"),
        ("block_size", 24, "--block-size"),
        ("block_size", 512, "--block-size"),
        ("gpu_memory_utilization", 0.0, "--gpu-memory-utilization"),
        ("gpu_memory_utilization", 1.01, "--gpu-memory-utilization"),
        ("max_model_len", 0, "--max-model-len"),
        ("kv_cache_memory_bytes", 0, "--kv-cache-memory-bytes"),
        ("max_queue", 0, "--max-queue"),
    ],
)
def test_engine_config_names_the_flag(field: str, value: object, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        EngineConfig(model_path=Path("."), **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("port", 70000, "--port"),
        ("served_model_names", (), "--served-model-name"),
        ("served_model_names", ("",), "--served-model-name"),
        ("served_model_names", ("a\nb",), "--served-model-name"),
        ("served_model_names", ("a\udcff",), "--served-model-name"),
        ("api_keys", ("",), "--api-key"),
        ("api_keys", ("k\n",), "--api-key"),
        ("shutdown_timeout_s", -1.0, "--shutdown-timeout"),
        ("shutdown_timeout_s", math.nan, "--shutdown-timeout"),
        ("request_timeout_s", -1.0, "--request-timeout"),
        ("request_timeout_s", math.inf, "--request-timeout"),
        ("root_path", "llm", "--root-path"),
        ("root_path", "/a b", "--root-path"),
        ("root_path", "/{x}", "--root-path"),
        ("ssl_keyfile", Path("k"), "--ssl-certfile"),
        ("allowed_origins", ("example.org",), "--allowed-origins"),
        ("allowed_origins", ("https://a.org/path",), "--allowed-origins"),
        ("allowed_methods", ("GET, POST",), "--allowed-methods"),
        ("allowed_headers", ("a\nb",), "--allowed-headers"),
        ("allow_credentials", True, "--allowed-origins"),
    ],
)
def test_server_config_names_the_flag(field: str, value: object, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        ServerConfig(**{"served_model_names": ("m",), field: value})  # type: ignore[arg-type]


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", "/somewhere/else")
    assert cache_dir() == Path("/somewhere/else")
    monkeypatch.delenv("PYSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/pyserve")
