"""Flags: the three ways to name a model, what is refused by name, what is ignored aloud."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pyserve import cli
from pyserve.api import serve
from pyserve.config import DEMO_MODEL, EngineConfig, ServerConfig
from pyserve.errors import CheckpointError, ConfigError
from pyserve.flags import make_parser, parse_args
from pyserve.model.config import ModelConfig
from pyserve.text.grammar import Grammars
from tests.text import samples


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


def server_config(*argv: str) -> ServerConfig:
    return cli._server_config(parse_args(list(argv)))


def test_the_server_s_flags_reach_its_config(tmp_path: Path) -> None:
    config = server_config(
        "m", "--uds", "/run/x.sock", "--root-path", "/llm/", "--ssl-certfile", "c", "--ssl-keyfile",
        "k", "--allowed-origins", '["https://a.org"]', "--allowed-methods", '["POST"]',
        "--allowed-headers", '["X-A"]', "--allow-credentials", "--ready-file", "r",
        "--request-timeout", "7", "--trust-request-chat-template", "--reasoning-parser", "qwen3",
        "--enable-log-requests", "--api-key", "a", "--api-key=b", "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes",
    )  # fmt: skip
    assert (config.enable_auto_tool_choice, config.tool_call_parser) == (True, "hermes")
    assert (config.uds, config.root_path) == (Path("/run/x.sock"), "/llm")
    assert (config.ssl_certfile, config.ssl_keyfile) == (Path("c"), Path("k"))
    assert config.allowed_origins == ("https://a.org",) and config.allow_credentials
    assert (config.allowed_methods, config.allowed_headers) == (("POST",), ("X-A",))
    assert (config.ready_file, config.request_timeout_s) == (Path("r"), 7.0)
    assert config.trust_request_chat_template and config.reasoning_parser == "qwen3"
    assert (config.log_requests, config.api_keys) == (True, ("a", "b"))
    engine = cli._engine_config(parse_args(["m", "--max-queue", "9"]), Path("/m"))
    assert engine.max_queue == 9


def test_defaults() -> None:
    config = server_config("org/m")
    assert config == ServerConfig(served_model_names=("org/m",))
    assert server_config().served_model_names == ("pyserve-demo",)
    assert cli._engine_config(parse_args(["m"]), Path("/m")) == EngineConfig(model_path=Path("/m"))


@pytest.mark.parametrize("path", ["llm", "/llm", "/llm/", "llm/"])
def test_root_path_takes_any_slashes(path: str) -> None:
    assert server_config("--root-path", path).root_path == "/llm"


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-env")
    assert server_config().api_keys == ("from-env",)
    assert server_config("--api-key", "k").api_keys == ("k",)


def test_a_host_beside_a_unix_socket_warns(caplog: pytest.LogCaptureFixture) -> None:
    server_config("--uds", "x")
    assert not caplog.records
    server_config("--uds", "x", "--port", "5")
    assert "--host and --port have no effect beside --uds" in caplog.text


@pytest.mark.parametrize("text", ["auto", "-1"])
def test_a_context_of_what_fits(text: str) -> None:
    assert parse_args(["--max-model-len", text]).max_model_len is None


def test_switches_can_be_turned_off() -> None:
    args = parse_args(
        ["--enable-log-requests", "--no-enable-log-requests", "--no-disable-log-stats"]
    )
    assert (args.enable_log_requests, args.disable_log_stats) == (False, False)


def test_variables_are_set_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[ServerConfig, str | None]] = []

    def run_server(config: ServerConfig, load: object) -> int:
        seen.append((config, os.environ.get("PYSERVE_TEST_B")))
        return 0

    monkeypatch.setattr(serve, "run_server", run_server)
    monkeypatch.setenv("VLLM_API_KEY", "old")
    monkeypatch.setenv("PYSERVE_TEST_B", "old")
    assert cli.main(["--env", "VLLM_API_KEY=new", "--env=PYSERVE_TEST_B=a=b"]) == 0
    assert seen[0][0].api_keys == ("new",) and seen[0][1] == "a=b"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_text_is_tokenised_by_the_thread_that_asks() -> None:
    program = (
        "import os; from pyserve import cli; from pyserve.api import serve; "
        "from pyserve.config import DEMO_MODEL; "
        "serve.run_server = lambda config, load: 0; assert cli.main([]) == 0; "
        "tokenizer = cli._tokenizer(DEMO_MODEL); before = len(os.listdir('/proc/self/task')); "
        "tokenizer.encode('word ' * 10_000, add_special_tokens=False); "
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize(
    "text", ["A", "=x", "A B=c", "1A=b", "A-B=c", "é=1", "LD_PRELOAD=x", "PYTHONPATH=x"]
)
def test_variables_that_cannot_be_set(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--env"):
        parse_args(["--env", text])


def test_calls_need_a_parser() -> None:
    with pytest.raises(ConfigError, match="--enable-auto-tool-choice needs --tool-call-parser"):
        server_config("m", "--enable-auto-tool-choice")


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_args(["--uds=~/s"]).uds == Path("/home/me/s")
    for text in ("", "~nobody-of-that-name/s"):
        with pytest.raises(ConfigError, match="--uds"):
            parse_args(["--uds", text])


def test_the_value_of_a_variable_is_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--env", "HF TOKEN=hf_secret"])
    assert "hf_secret" not in str(caught.value)


def test_help_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert len(lines) <= 96 and max(map(len, lines)) <= 100
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    flags = [a.option_strings[0] for a in make_parser()._actions if a.help != argparse.SUPPRESS]
    assert len(shown) == len(flags) - 1  # but -h
    assert all(re.match(r"  --\S.*\S  +\S", line) for line in lines if line.startswith("  --"))
    assert not [line for line in lines if line.startswith("     ") and "python -m" not in line]
    assert {"--enable-log-requests", "--no-enable-prefix-caching"} <= {*shown}


def test_what_a_path_cannot_be_is_said_before_the_port_opens(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file, nowhere = str(tmp_path / "file"), str(tmp_path / "no" / "where")
    for argv, message in (
        (["--model", nowhere], "neither a folder nor a name"),
        (["--model", file], "neither a folder nor a name"),
        (["--model", ""], "neither a folder nor a name"),
        (["--model", str(tmp_path)], "no config.json"),
        (["--tokenizer", nowhere], "--tokenizer"),
        (["--chat-template", nowhere], "--chat-template"),
        (["--generation-config", nowhere], "--generation-config"),
        (["--download-dir", f"{file}/x"], "--download-dir"),
        (["--ready-file", str(tmp_path)], "--ready-file"),
        (["--ready-file", nowhere], "--ready-file"),
        (["--model", "/" + "x/" * 5000], "neither a folder nor a name"),
        (["--tokenizer", "/" + "x" * 300], "neither a folder nor a name"),
        (["--chat-template", "x" * 300], "--chat-template .*cannot be read: File name too long"),
        (["--chat-template", "/dev/null"], "not a regular file"),
        (["--reasoning-parser", "qwen4"], "must be one of deepseek_r1, .*, none, got qwen4"),
        (["--tool-call-parser", "json"], "must be one of deepseek_v3, .*hermes.*, got json"),
        (["--generation-config", "x" * 300], "--generation-config"),
        (["--ready-file", "/tmp/" + "x" * 300 + "/y"], "--ready-file"),
    ):
        args = parse_args(argv)
        with pytest.raises(ConfigError, match=message):
            launch, config = cli._launch_config(args), cli._server_config(args)
            cli._check_paths(args)
            cli._check_leaders_paths(launch, config)
            cli._check_text(launch, config)
    args = parse_args(
        ["org/name", "--download-dir", nowhere, "--chat-template", "{{ messages }}",
         "--ready-file", str(tmp_path / "ready")]
    )  # fmt: skip
    cli._check_paths(args)
    cli._check_leaders_paths(cli._launch_config(args), cli._server_config(args))


@pytest.fixture
def as_a_follower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells rank 1 of 2."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pyserve.log.setup", lambda *given, **named: None)
    monkeypatch.setattr(cli, "_prepare_threads", lambda: None)


@pytest.mark.usefixtures("as_a_follower")
def test_who_follows_needs_no_paths_of_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is another machine's, and is told the same line."""
    monkeypatch.setattr(cli, "_follow", lambda args: 7)
    line = ["--ready-file", "/no/where", "--generation-config", "/no", "--chat-template", "/no/x"]
    assert cli.main(line) == 7
    assert cli.main(["--model", "/no/where"]) == 2


@pytest.mark.usefixtures("as_a_follower")
def test_who_follows_knows_answers_by_the_leader_s_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples.byte_level().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(cli, "_agree", lambda *given: None)
    args = parse_args(["--runner", "score", "--tokenizer", str(tmp_path)])
    with pytest.raises(ConfigError, match=f"{tmp_path}: the tokenizer has no token 'no'"):
        cli._follow(args)


def test_plan_is_a_command_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def plan(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    module = ModuleType("pyserve.plan.command")
    module.main = plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyserve.plan.command", module)
    assert cli.main(["plan", "--model", "x"]) == 7
    assert cli.main(["help", "plan"]) == cli.main(["plan", "help"]) == 7
    assert seen == [["--model", "x"], ["--help"], ["--help"]]


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


def test_a_tokenizer_is_read_or_converted_by_what_the_folder_has(tmp_path: Path) -> None:
    backend = samples.byte_level()
    backend.model.save(str(tmp_path))  # vocab.json and merges.txt
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = backend.encode("the fox").ids
    assert cli._tokenizer(tmp_path).encode("the fox", add_special_tokens=True) == expected
    (tmp_path / "tokenizer.model").write_bytes(b"junk")  # goes before them
    with pytest.raises(CheckpointError, match="not a SentencePiece|pip install sentence"):
        cli._tokenizer(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))  # goes before all
    assert cli._tokenizer(tmp_path).encode("the fox", add_special_tokens=True) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_file_that_is_none_is_not_passed_over(name: str, tmp_path: Path) -> None:
    samples.byte_level().model.save(str(tmp_path))  # vocab.json and merges.txt
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file|pip install sentence"):
        cli._tokenizer(tmp_path)


def test_grammars_are_prepared_beside_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = ModelConfig.from_path(DEMO_MODEL).vocab_size
    is_prepared = threading.Event()

    def build_engine(config: EngineConfig, **given: object) -> SimpleNamespace:
        assert is_prepared.wait(30), "nobody prepares while this is under way"
        return SimpleNamespace(info=SimpleNamespace(vocab_size=vocab_size))

    def broken(self: Grammars) -> None:
        is_prepared.set()
        raise MemoryError

    load = cli._loader(parse_args([]))
    monkeypatch.setattr("pyserve.engine.load.build_engine", build_engine)
    monkeypatch.setattr(Grammars, "prepare", lambda self: is_prepared.set())
    loaded = load(lambda phase, done, total: None)
    assert loaded.grammars.vocabulary.vocab_size == vocab_size
    monkeypatch.setattr(Grammars, "prepare", broken)
    with pytest.raises(MemoryError):
        load(lambda phase, done, total: None)


def test_generation_config_must_exist(tmp_path: Path) -> None:
    assert cli._generation_folder("auto", tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="--generation-config"):
        cli._generation_folder(str(tmp_path), tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert cli._generation_folder(str(tmp_path), Path("/m")) == tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-model-length", "5"], "did you mean --max-model-len?"),
        (["--dtype", "int3"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--port", "x"], "--port"),
        (["-z"], "unknown flag -z"),
        (["--allowed-origins", "*"], "must be a JSON list"),
        (["--allowed-origins", "[1]"], "must be a JSON list"),
        (["--default-chat-template-kwargs", "[1]"], "must be a JSON object"),
        (["--default-chat-template-kwargs", "{a: 1}"], "must be a JSON object"),
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


def test_the_log_says_whose_use_of_keys_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pyserve")
    cli._tell_of_names(server_config("--api-key", "s3cret"))
    assert not caplog.records
    cli._tell_of_names(server_config("--api-key", "alice=s3cret", "other", "alice=s3cret2"))
    (record,) = caplog.records
    assert record.getMessage().endswith("by name: alice, key-2")


def test_public_address_without_key_warns(caplog: pytest.LogCaptureFixture) -> None:
    for argv in (["--host", "0.0.0.0"], ["--host", "::1"], ["--api-key", "k"], ["--uds", "x"]):
        cli._warn_of_exposure(server_config(*argv))
    assert len([r for r in caplog.records if "--api-key" in r.getMessage()]) == 1
