"""Flags: the three ways to name a model, what is refused by name, what is ignored aloud."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyserve import cli
from pyserve.errors import ConfigError
from pyserve.flags import NEUTRAL, NO_MEANING, NOT_BUILT, parse_args


@pytest.mark.parametrize(
    "argv", [["--model", "org/m"], ["org/m"], ["serve", "org/m"], ["serve", "--model=org/m"]]
)
def test_three_ways_to_name_a_model(argv: list[str]) -> None:
    assert parse_args(argv).model == "org/m"


def test_model_given_twice() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_args(["a", "--model", "b"])


def test_underscores_and_size_suffixes() -> None:
    args = parse_args(["--max_model_len", "32k", "--max-num-batched-tokens=4K"])
    assert (args.max_model_len, args.max_num_batched_tokens) == (32000, 4096)
    config = cli._engine_config(args, Path("/m"))
    assert (config.max_model_len, config.max_num_batched_tokens) == (32000, 4096)


def test_flags_reach_the_configs() -> None:
    args = parse_args(
        "--model m --host 127.0.0.1 --port 81 --api-key k --served-model-name a b --dtype float "
        "--block-size 32 --no-enable-prefix-caching --max-num-seqs 7 --shutdown-timeout 3 "
        "--kv-cache-memory-bytes 1000000 --scheduling-policy priority --disable-log-stats "
        "--gpu-memory-utilization 0.5 --load-format dummy --seed 5 --allow-reference-ops "
        "--device cuda".split()
    )
    engine = cli._engine_config(args, Path("/m"))
    server = cli._server_config(args)
    assert (engine.dtype, engine.block_size, engine.max_num_seqs) == ("float32", 32, 7)
    assert (engine.enable_prefix_caching, engine.allow_reference_ops) == (False, True)
    assert (engine.scheduling_policy, engine.kv_cache_memory_bytes) == ("priority", 1_000_000)
    assert (engine.gpu_memory_utilization, engine.load_format, engine.seed) == (0.5, "dummy", 5)
    assert engine.device == "cuda"
    assert (server.host, server.port, server.api_keys) == ("127.0.0.1", 81, ("k",))
    assert server.served_model_names == ("a", "b")
    assert (server.shutdown_timeout_s, server.log_stats) == (3.0, False)


def test_what_is_left_to_the_machine() -> None:
    engine = cli._engine_config(parse_args(["m"]), Path("/m"))
    assert (engine.device, engine.max_num_batched_tokens, engine.max_model_len) == (
        "auto", None, None,
    )  # fmt: skip


def test_the_guide_s_production_flags_are_known() -> None:
    parse_args(
        "serve org/m --host 0.0.0.0 --port 8000 --tensor-parallel-size 1 --max-model-len 8192 "
        "--gpu-memory-utilization 0.9 --max-num-seqs 256 --enable-prefix-caching".split()
    )


@pytest.mark.parametrize("flag", sorted(NOT_BUILT))
def test_not_built_flags_are_named(flag: str) -> None:
    value = [] if NOT_BUILT[flag] == 0 else ["7"]
    with pytest.raises(ConfigError, match=f"--{flag} is not built yet"):
        parse_args([f"--{flag}", *value])


def test_what_asks_for_nothing_is_accepted() -> None:
    parse_args(["m", "--no-enable-lora", "--task", "generate", "--kv-cache-dtype=auto"])
    for flag, values in NEUTRAL.items():
        for value in values:
            parse_args(["m", f"--{flag}", str(value)])
    assert not set(NOT_BUILT) & set(NO_MEANING) and set(NEUTRAL) <= set(NOT_BUILT)


def test_generation_config_must_exist(tmp_path: Path) -> None:
    assert cli._generation_folder("auto", tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="--generation-config"):
        cli._generation_folder(str(tmp_path), tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert cli._generation_folder(str(tmp_path), Path("/m")) == tmp_path


@pytest.mark.parametrize("flag", sorted(NO_MEANING))
def test_flags_without_meaning_warn(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    value = [] if NO_MEANING[flag] == 0 else ["1"]
    args = parse_args(["m", f"--{flag}", *value])
    assert args.model == "m"
    assert [r.getMessage() for r in caplog.records if f"--{flag} " in r.getMessage()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-model-length", "5"], "did you mean --max-model-len?"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size 2 is not built yet"),
        (["--dtype", "int3"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--port", "x"], "--port"),
        (["a", "b"], "unexpected argument 'b'"),
    ],
)  # fmt: skip
def test_wrong_flags_say_what_to_do(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    assert message in str(caught.value)


def test_a_wrong_value_ends_before_the_port_opens() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyserve", "--block-size", "17"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--block-size must be a power of two, got 17" in done.stderr
    assert "Traceback" not in done.stderr


def test_public_address_without_key_warns(caplog: pytest.LogCaptureFixture) -> None:
    cli._server_config(parse_args(["--host", "0.0.0.0"]))
    cli._server_config(parse_args(["--host", "127.0.0.1"]))
    cli._server_config(parse_args(["--api-key", "k"]))
    assert len([r for r in caplog.records if "--api-key" in r.getMessage()]) == 1
