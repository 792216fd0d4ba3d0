"""The file of --config: flags by name, the command line wins, everything else is an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyserve import cli
from pyserve.config_file import MAX_BYTES, with_settings
from pyserve.errors import ConfigError
from pyserve.flags import parse_args


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def test_every_kind_of_setting(file: Path) -> None:
    file.write_text(
        """
        # as vLLM has it
        model: org/m
        port: 81
        max_model_len: 32k
        gpu-memory-utilization: 0.5
        served-model-name: [a, "007"]
        api-key:
          - k1
          - "-k2"
        allowed-origins: ["https://a.org"]
        env: [A=1, B=c=d]
        enable-prefix-caching: false
        enable-log-requests: yes
        no-disable-log-stats: true
        seed: -1
        """
    )
    args = parse_args(cli._with_file(["serve", "--config", str(file)]))
    assert (args.model, args.port, args.max_model_len) == ("org/m", 81, 32000)
    assert (args.served_model_name, args.api_key) == (["a", "007"], ["k1", "-k2"])
    assert (args.allowed_origins, args.env) == (["https://a.org"], [("A", "1"), ("B", "c=d")])
    assert (args.enable_prefix_caching, args.enable_log_requests) == (False, True)
    assert (args.disable_log_stats, args.seed, args.gpu_memory_utilization) == (False, -1, 0.5)


@pytest.mark.parametrize("argv", [["org/mine"], ["--model=org/mine"]])
def test_the_command_line_wins(file: Path, argv: list[str]) -> None:
    file.write_text("model: org/m\napi-key: [a, b]\nport: 1\nenable-prefix-caching: true\nseed: 3")
    argv = [
        "--config",
        str(file),
        "--api-key",
        "c",
        "--port=2",
        "--no-enable-prefix-caching",
        *argv,
    ]
    args = parse_args(with_settings(file, argv))
    assert (args.model, args.api_key, args.port) == ("org/mine", ["c"], 2)
    assert (args.enable_prefix_caching, args.seed) == (False, 3)


@pytest.mark.parametrize("text", ["port: 5\n", "# mine\nport: 5\n", '{"port": 5}'])
def test_a_byte_order_mark_is_skipped(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8-sig")
    assert with_settings(file, ["org/m"]) == ["org/m", "--port=5"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_says_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    assert with_settings(file, ["org/m"]) == ["org/m"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-length: 5", "max-model-length is not a setting, did you mean max-model-len?"),
        ("config: other.yaml", "config is not a setting"),
        ("port: x", "argument --port: invalid int value: 'x'"),
        ("port: [1, 2]", "port takes one value, not a list"),
        ("port: true", "port must be a value, not true or false"),
        ('host: "a\\0b"', "host holds a NUL character"),
        ("port:", "line 1: port has no value"),
        ("a: 1\nport: {a: 1}", "line 2: port must be a value or a list of values"),
        ("api-key: [[a]]", "must be a value or a list of values, nothing nested"),
        ("api-key: []", "must be a value or a list of values"),
        ("enable-prefix-caching: 1", "enable-prefix-caching must be true or false"),
        ("served-model-name: [a, --port]", "'--port' must not begin with a dash"),
        ("port: 1\nport: 2", "line 2: port is given twice"),
        ("- port", "must hold lines such as 'port: 8000'"),
        ("? [a]\n: b", "a key must be the name of a flag"),
        ("port: 1\n b: :\n", "is not YAML in line 2"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        ("tensor-parallel-size: two", "--tensor-parallel-size"),
        ("[" * 3000, "is not YAML"),
    ],
)
def test_wrong_files_say_where(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        with_settings(file, ["org/m"])
    assert str(caught.value).startswith(f"--config {file}")


def test_files_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        with_settings(file, [])
    file.write_bytes(b"port: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        with_settings(file, [])
    file.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="longer than"):
        with_settings(file, [])
    with pytest.raises(ConfigError, match="Is a directory"):
        with_settings(file.parent, [])


def test_settings_as_vllm_has_them(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Switches, values that may be left away, and objects, which other settings must not be."""
    file.write_text(
        """
        hf-token: true
        kv-cache-memory-bytes: 4G
        enable-chunked-prefill: False
        disable-log-requests: true
        compilation-config:
          pass_config: {fuse: true}
          level: 3
        hf_overrides: {}
        tool-parser-plugin: false
        """
    )
    args = parse_args(with_settings(file, ["org/m"]))
    assert (args.hf_token, args.kv_cache_memory_bytes, args.model) == (True, 2**32, "org/m")
    assert args.enable_log_requests is False
    assert "--compilation-config has no meaning" in caplog.text
    file.write_text("default-chat-template-kwargs: {enable_thinking: false, a: {b: [1]}}")
    args = parse_args(with_settings(file, ["org/m"]))
    assert args.default_chat_template_kwargs == {"enable_thinking": False, "a": {"b": [1]}}
    file.write_text("hf-overrides: {a: 1}")
    with pytest.raises(ConfigError, match="--hf-overrides is not built yet"):
        parse_args(with_settings(file, []))
    file.write_text("hf-overrides: &a {x: *a}")
    with pytest.raises(ConfigError, match="line 1: hf-overrides is no object that JSON could hold"):
        with_settings(file, [])


def test_flags_that_are_not_built_are_named_from_a_file_too(file: Path) -> None:
    file.write_text("tool-parser-plugin: a.py\ntrust-remote-code: true")
    with pytest.raises(ConfigError, match="--tool-parser-plugin is not built yet"):
        parse_args(with_settings(file, []))
