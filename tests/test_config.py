"""Settings refuse what cannot be served and name the flag."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from pyserve.config import EngineConfig, ServerConfig, cache_dir, named_keys
from pyserve.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("max_num_seqs", 0, "--max-num-seqs"),
        ("max_num_batched_tokens", 0, "--max-num-batched-tokens"),
        ("tensor_parallel_size", 3, "--tensor-parallel-size must be 1, 2, 4 or 8"),
        ("tensor_parallel_size", 16, "--tensor-parallel-size"),
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
        ("api_keys", ("k", "alice="), "--api-key alice=...: the key must not be empty"),
        ("api_keys", ("alice= k",), "--api-key alice=...: the key must not begin or end"),
        ("api_keys", ("=k",), "--api-key, value 1: NAME=KEY needs a name of 1 to 32 letters"),
        ("api_keys", ("k", "a b=k"), "--api-key, value 2: NAME=KEY needs a name"),
        ("api_keys", ("key-2=k",), "does not begin with key-"),
        ("api_keys", (f"{'a' * 33}=k",), "--api-key, value 1: NAME=KEY needs a name"),
        ("api_keys", ("a=k", "b=k"), "--api-key b=...: a has the same key"),
        ("api_keys", ("k", "b=k"), "--api-key b=...: key-1 has the same key"),
        ("api_keys", ("a=k", "k"), "--api-key, value 2: a has the same key"),
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
    with pytest.raises(ConfigError, match=re.escape(flag)):
        ServerConfig(**{"served_model_names": ("m",), field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "users"),
    [
        ((), ()),
        (("one", "two"), (("key-1", "one"), ("key-2", "two"))),
        (("one", "one"), (("key-1", "one"),)),
        (("alice=a", "two", "b.o_b-1=b=c=="),
         (("alice", "a"), ("key-2", "two"), ("b.o_b-1", "b=c=="))),
        (("alice=old", "alice=new"), (("alice", "old"), ("alice", "new"))),
        # base64 of 16, 32 and 20 bytes, the last one in the alphabet for URLs, without a name
        (("MDEyMzQ1Njc4OWFiY2RlZg==",), (("key-1", "MDEyMzQ1Njc4OWFiY2RlZg=="),)),
        (("VGhpcyBpcyBhIGtleSBvZiB0aGlydHktdHdvIGJ5dC4=",),
         (("key-1", "VGhpcyBpcyBhIGtleSBvZiB0aGlydHktdHdvIGJ5dC4="),)),
        (("__-_MDEyMzQ1Njc4OWFiY2RlZgA=",), (("key-1", "__-_MDEyMzQ1Njc4OWFiY2RlZgA="),)),
        (("a=MDEyMzQ1Njc4OWFiY2RlZg==",), (("a", "MDEyMzQ1Njc4OWFiY2RlZg=="),)),
    ],
)  # fmt: skip
def test_a_key_has_a_name_or_a_number(
    words: tuple[str, ...], users: tuple[tuple[str, str], ...]
) -> None:
    assert named_keys(words) == users


@pytest.mark.parametrize(
    "words", [("a b=s3cret",), ("a= s3cret",), ("a=s3cret", "b=s3cret"), ("s3cret=",), (" s3cret",)]
)
def test_no_message_shows_a_key(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        named_keys(words)
    assert "s3cret" not in str(caught.value).replace("s3cret=...: the key must not be empty", "")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", "/somewhere/else")
    assert cache_dir() == Path("/somewhere/else")
    monkeypatch.delenv("PYSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/pyserve")
