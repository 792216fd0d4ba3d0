"""Every row of the flags in every form that vLLM has for it; what is named, refused and ignored."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve import flags
from pyserve.errors import ConfigError
from pyserve.features import FEATURES, FLAGS
from pyserve.flag_words import plain_words
from pyserve.flags import make_parser, parse_args
from pyserve.foreign_flags import JSON, LIST, NO_MEANING, SWITCH, VALUE
from tests import vllm_flags as vllm

FOREIGN = {name: flag.form for name, flag in (FLAGS | NO_MEANING).items()}
NOT_BUILT = {name: flag for name, flag in FLAGS.items() if flag.ignored is None}
# Of versions between the three.
NOT_IN_THE_WHEELS = {"worker-use-ray", "intial-incremental-detokenization-offset"}
PARSER = make_parser()

# What pyserve does itself: name -> words behind it, and what is read from them.
OWN: dict[str, list[tuple[list[str], object]]] = {
    "config": [(["a.yaml"], Path("a.yaml")), (["~/a"], Path.home() / "a")],
    "env": [(["A=b=c"], [("A", "b=c")])],
    "model": [(["org/m"], "org/m")],
    "tokenizer": [(["org/t"], "org/t"), (["None"], None), ([""], None)],
    "revision": [(["v1"], "v1"), (["None"], None), ([""], None)],
    "download-dir": [(["/d"], Path("/d")), (["None"], None)],
    "hf-token": [(["hf_x"], "hf_x"), ([], True), ([""], None)],
    "load-format": [(["dummy"], "dummy")],
    "dtype": [(["half"], "half"), (["bfloat16"], "bfloat16")],
    "chat-template": [(["t.jinja"], "t.jinja"), (["None"], None), ([""], None)],
    "generation-config": [(["vllm"], "vllm")],
    "runner": [(["pooling"], "pooling"), (["embedding"], "embedding"), (["score"], "score")],
    "convert": [(["classify"], "classify")],
    "seed": [(["-1"], -1), (["0"], 0)],
    "device": [(["cpu"], "cpu")],
    "max-model-len": [
        (["4096"], 4096), (["32k"], 32_000), (["25.6k"], 25_600), (["32K"], 32_768),
        (["1m"], 10**6), (["1M"], 2**20), (["auto"], None), (["Auto"], None), (["-1"], None),
    ],
    "gpu-memory-utilization": [(["0.5"], 0.5)],
    "quantization": [
        (["awq"], "awq"), (["awq_marlin"], "awq"), (["gptq_marlin"], "gptq"), (["None"], None),
        (["compressed-tensors"], "compressed-tensors"), ([""], None),
    ],
    "kv-cache-memory-bytes": [
        (["1000"], 1000), (["1G"], 2**30), (["1g"], 10**9), (["1.5g"], 1_500_000_000),
        (["2T"], 2**41), (["500m"], 500_000_000), (["None"], None), ([""], None),
    ],
    "max-num-seqs": [(["7"], 7)],
    "max-num-batched-tokens": [(["2048"], 2048), (["4K"], 4096), (["4k"], 4000)],
    "block-size": [(["32"], 32)],
    "scheduling-policy": [(["priority"], "priority")],
    "tensor-parallel-size": [(["2"], 2)],
    "pipeline-parallel-size": [(["2"], 2)],
    "host": [(["::1"], "::1"), (["None"], None), ([""], None)],
    "port": [(["81"], 81)],
    "uds": [(["/s"], Path("/s")), (["None"], None)],
    "ssl-certfile": [(["/c"], Path("/c")), (["None"], None)],
    "ssl-keyfile": [(["/k"], Path("/k")), (["None"], None)],
    "api-key": [(["a"], [["a"]]), (["a", "b"], [["a", "b"]])],
    "served-model-name": [(["a"], ["a"]), (["a", "b"], ["a", "b"])],
    "root-path": [(["/llm"], "/llm"), (["None"], None), ([""], None)],
    "allowed-origins": [(['["*"]'], ["*"])],
    "allowed-methods": [(['["GET", "POST"]'], ["GET", "POST"])],
    "allowed-headers": [(["[]"], [])],
    "default-chat-template-kwargs": [
        (['{"a": [1]}'], {"a": [1]}), (["{}"], {}), (["None"], None), ([""], None),
    ],
    "reasoning-parser": [(["qwen3"], "qwen3"), (["None"], None), ([""], None)],
    "tool-call-parser": [(["hermes"], "hermes"), (["None"], None), ([""], None)],
    "ready-file": [(["/r"], Path("/r")), (["None"], None)],
    "shutdown-timeout": [(["3"], 3.0), (["0.5"], 0.5)],
    "target-itl-ms": [(["0"], 0), (["50"], 50)],
    "trace": [(["a.json"], Path("a.json"))],
    "max-queue": [(["9"], 9)],
    "lora-modules": [
        (["a=b"], [("a", "b")]), (["a=b=c", "d=/e f"], [("a", "b=c"), ("d", "/e f")]),
        (['{"name": "a,b", "path": "p", "base_model_name": "m"}'], [("a,b", "p")]),
    ],
    "lora-dir": [(["/l"], Path("/l")), (["None"], None)],
    "max-loras": [(["4"], 4)],
    "max-lora-rank": [(["64"], 64)],
    "max-cpu-loras": [(["9"], 9), (["None"], None)],
    "lora-dtype": [(["auto"], "auto"), (["bfloat16"], "bfloat16")],
    "idle-sleep": [(["5"], 5.0), (["0.5"], 0.5)],
    "batch-dir": [(["/b"], Path("/b")), (["None"], None)],
    "batch-max-file-bytes": [(["1000"], 1000), (["1M"], 2**20)],
    "batch-max-total-bytes": [(["2G"], 2**31)],
    "batch-max-inflight": [(["3"], 3)],
    "max-logprobs": [(["5"], 5), (["0"], 0)],
    "logprobs-mode": [(["processed_logits"], "processed_logits")],
    "request-timeout": [(["7"], 7.0)],
    "response-store-size": [(["0"], 0), (["1G"], 2**30)],
    "response-store-age": [(["60"], 60.0)],
    "log-level": [(["debug"], "debug"), (["INFO"], "info"), (["CRITICAL"], "critical")],
}  # fmt: skip
OWN_SWITCHES = {
    "enable-auto-tool-choice", "return-tokens-as-token-ids",
    "enable-prefix-caching", "enforce-eager", "allow-reference-ops", "allow-credentials",
    "disable-log-stats", "trust-request-chat-template", "enable-log-requests", "share-prefix-cache",
    "enable-lora",
}  # fmt: skip
VLLM = sorted(vllm.SWITCHES | vllm.VALUES | vllm.LISTS | vllm.OBJECTS)


@pytest.fixture(autouse=True)
def _one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes longer than most tests here; those of tests/test_cli.py make their own."""
    monkeypatch.setattr(flags, "make_parser", lambda: PARSER)


def read(argv: list[str]) -> argparse.Namespace:
    """As the server reads its arguments, but without an opinion about what they ask for."""
    return flags.parse(PARSER, plain_words(PARSER, argv))


def value_of(name: str, *words: str) -> object:
    """What is read for a flag, which must leave what stands before and behind it alone."""
    own = name.replace("-", "_")
    behind = [] if name == "port" else ["--port", "81"]
    argv = [*([] if name == "model" else ["org/m"]), *words, *behind]
    args = read(argv)
    said = vars(args)
    assert name == "model" or args.positional_model == "org/m", argv
    assert args.port == 81 and args.max_queue == (9 if name == "max-queue" else None), argv
    return said[own] if own in said else said[name]


def test_the_rows_are_those_of_the_parser() -> None:
    shown = {
        action.option_strings[0].removeprefix("--")
        for action in PARSER._actions
        if action.option_strings and action.help != argparse.SUPPRESS
    }
    assert shown - {"-h", "version"} == set(OWN) | OWN_SWITCHES
    assert not set(FLAGS) & set(NO_MEANING)
    assert len(FLAGS) == sum(len(feature.flags) for feature in FEATURES.values())
    assert not (shown & set(FOREIGN)), "a flag that is built is not named as one that is not"


@pytest.mark.parametrize("name", VLLM)
def test_every_flag_of_vllm_is_known_in_its_form(name: str) -> None:
    form = FOREIGN.get(name)
    if form is not None:
        among = {SWITCH: vllm.SWITCHES, VALUE: vllm.VALUES, LIST: vllm.LISTS, JSON: vllm.OBJECTS}
        assert name in among[form]
    twin = name.replace("disable-", "enable-", 1)
    assert form or name in OWN or name in OWN_SWITCHES or twin in OWN_SWITCHES


@pytest.mark.parametrize("name", sorted(set(FOREIGN) - set(VLLM)))
def test_rows_that_no_wheel_has(name: str) -> None:
    assert name in NOT_IN_THE_WHEELS


def spellings(name: str) -> Iterator[str]:
    yield f"--{name}"
    yield f"--{name.replace('-', '_')}"
    yield from (alias for alias, known in vllm.ALIASES.items() if known == name)


@pytest.mark.parametrize("name", sorted(vllm.SWITCHES | OWN_SWITCHES))
def test_every_form_of_a_switch(name: str) -> None:
    base, on, off = name, True, False
    if name not in FOREIGN and name not in OWN_SWITCHES:  # the other name of one of ours
        base, on, off = name.replace("disable-", "enable-", 1), False, True
    for spelt in spellings(name):
        assert value_of(base, spelt) is on
        for word in ("true", "True", "TRUE"):
            assert value_of(base, f"{spelt}={word}") is value_of(base, spelt, word) is on
        for word in ("false", "False"):
            assert value_of(base, f"{spelt}={word}") is value_of(base, spelt, word) is off
    assert value_of(base, f"--no-{name}") is value_of(base, f"--no_{name}") is off
    assert value_of(base, f"--no-{name}=false") is on
    for prefix, other in (("enable-", "disable-"), ("disable-", "enable-")):
        twin = other + name.removeprefix(prefix)
        if name.startswith(prefix) and twin not in FOREIGN:
            assert value_of(base, f"--{twin}") is value_of(base, f"--{twin}", "True") is off
            assert value_of(base, f"--{twin}=False") is value_of(base, f"--no-{twin}") is on
    with pytest.raises(ConfigError, match=f"--{name} is a switch: it takes true or false, not '2'"):
        read([f"--{name}=2"])


@pytest.mark.parametrize("name", sorted(OWN))
def test_every_form_of_a_flag_of_ours(name: str) -> None:
    for words, expected in OWN[name]:
        for spelt in spellings(name):
            assert value_of(name, spelt, *words) == expected
            if len(words) == 1 and not spelt.startswith("--no"):
                assert value_of(name, f"{spelt}={words[0]}") == expected


@pytest.mark.parametrize("name", sorted((vllm.VALUES | vllm.LISTS) & set(FOREIGN)))
def test_every_form_of_a_value_of_vllm(name: str) -> None:
    one: object = ["7"] if FOREIGN[name] == LIST else "7"
    for spelt in spellings(name):
        assert value_of(name, spelt, "7") == value_of(name, f"{spelt}=7") == one
        if name in vllm.LISTS:
            assert value_of(name, spelt, "7", "a=b", "9") == ["7", "a=b", "9"]
        else:
            assert value_of(name, spelt) is True


@pytest.mark.parametrize("name", sorted(vllm.OBJECTS - set(OWN)))
def test_every_form_of_an_object_of_vllm(name: str) -> None:
    text = '{"a_b": {"c": 1.5}}'
    for spelt in spellings(name):
        assert value_of(name, spelt, text) == value_of(name, f"{spelt}={text}") == text
        for words in ([f"{spelt}.a_b.c", "1.5"], [f"{spelt}.a_b.c=1.5"]):
            assert json.loads(str(value_of(name, *words))) == {"a_b.c": "1.5"}
        assert json.loads(str(value_of(name, f"{spelt}.a+", "x,y"))) == {"a+": "x,y"}
    with pytest.raises(ConfigError, match=f"--{name}.a needs a value"):
        read([f"--{name}.a"])


def test_every_form_of_an_object_of_ours() -> None:
    name = "default-chat-template-kwargs"
    for spelt in spellings(name):
        assert (
            value_of(name, spelt, '{"a_b": 1}')
            == value_of(name, f'{spelt}={{"a_b": 1}}')
            == ({"a_b": 1})
        )
        words = [f"{spelt}.a_b.c", "false", f"{spelt}.a_b.d=x", f"{spelt}.e", "1.5"]
        assert value_of(name, *words) == {"a_b": {"c": False, "d": "x"}, "e": 1.5}
        with pytest.raises(ConfigError, match=f"^--{name}.a.b: a is 1 already$"):
            read([f"--{name}.a", "1", f"--{name}.a.b", "2"])
    with pytest.raises(ConfigError, match=f"--{name}.a needs a value"):
        read([f"--{name}.a"])


def test_the_older_meaning_of_o() -> None:
    assert value_of("optimization-level", "-O3") == value_of("optimization-level", "-O", "3") == "3"
    assert value_of("optimization-level", "-O=3") == "3"
    assert value_of("optimization-level", "-O.level=3") == '{"level": "3"}'


@pytest.mark.parametrize("name", sorted(set(vllm.SIZES) & set(FOREIGN) | set(vllm.NULLABLE)))
def test_what_asks_for_nothing_in_vllm_asks_for_nothing_here(name: str) -> None:
    if name in vllm.NULLABLE and name not in OWN:
        parse_args(["m", f"--{name}=None"])
        parse_args(["m", f"--{name}="])
    elif name == "api-key":
        with pytest.raises(ConfigError, match="--api-key: must not be None"):
            parse_args(["m", "--api-key", "None"])
    elif name != "generation-config" and name in OWN and name in vllm.NULLABLE:
        assert (["None"], None) in OWN[name]


@pytest.mark.parametrize(
    "text", ["", "x", "1KB", "1.5K", "1 k", "k", "1kk", "0x10", "1e3", "9" * 40]
)
def test_what_is_no_size(text: str) -> None:
    for name in ("max-model-len", "max-num-batched-tokens"):
        with pytest.raises(ConfigError, match=f"--{name}: must be a number such as 4096, 32k"):
            read([f"--{name}={text}"])


@pytest.mark.parametrize("flag", sorted(NOT_BUILT))
def test_not_built_flags_are_named(flag: str) -> None:
    words = {SWITCH: [], VALUE: ["7"], LIST: ["7"], JSON: ['{"a": 1}']}[NOT_BUILT[flag].form]
    with pytest.raises(ConfigError, match=f"--{flag} is not built yet") as caught:
        parse_args([f"--{flag}", *words])
    assert (NOT_BUILT[flag].instead or "") in str(caught.value)
    with pytest.raises(ConfigError, match=f"--{flag} is not built yet"):
        parse_args(["m", NOT_BUILT[flag].short or f"--{flag}"])


@pytest.mark.parametrize("flag", sorted(NOT_BUILT))
def test_not_built_flags_that_ask_for_nothing_are_accepted(
    flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    forms: list[list[str]] = {
        SWITCH: [[f"--no-{flag}"], [f"--{flag}=False"], [f"--{flag}", "false"]],
        JSON: [[f"--{flag}", "{}"]],
    }.get(NOT_BUILT[flag].form, [])
    forms += [[f"--{flag}", value] for value in NOT_BUILT[flag].neutral]
    for form in forms:
        assert parse_args([*form, "--port=1", "m"]).model == "m"
    if flag in ("cpu-offload-gb", "data-parallel-size"):
        parse_args(["m", f"--{flag}={NOT_BUILT[flag].neutral[0]}.0"])
    assert not caplog.records


@pytest.mark.parametrize(
    "words",
    [['{"backend":"xgrammar"}'], ['{ "backend" : "auto" }'], [".backend", "guidance"]],
)
def test_the_engine_of_structured_outputs_may_be_named(words: list[str]) -> None:
    name = "--structured-outputs-config"
    given = [name + words[0], words[1]] if words[0].startswith(".") else [name, *words]
    assert parse_args(["m", *given]).model == "m"
    with pytest.raises(ConfigError, match="give disable_any_whitespace and the like in requests"):
        parse_args(["m", name, '{"disable_any_whitespace": true}'])


@pytest.mark.parametrize("flag", sorted(NO_MEANING))
def test_flags_without_meaning_warn(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    words = [] if NO_MEANING[flag].form == SWITCH else ["1"]
    assert parse_args(["m", f"--{flag}", *words]).model == "m"
    assert [r.getMessage() for r in caplog.records if f"--{flag} has no meaning" in r.getMessage()]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["m", "--seed", "0"], "--seed has no effect"),
        (["--revision", "v1"], "--revision has no effect without --model"),
    ],
)
def test_what_is_without_effect_is_said(
    argv: list[str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    parse_args(argv)
    assert line in caplog.text


def test_what_has_its_effect_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    parse_args(["m", "--seed", "3", "--load-format", "dummy", "--revision", "v1"])
    parse_args(["m", "--disable-log-requests", "--enable-prefix-caching=True"])
    assert not caplog.records


@pytest.mark.parametrize(
    "argv",
    [
        ["--served-model-name", "a", "org/m"],
        ["--api-key", "k", "org/m"],
        ["--collect-detailed-traces", "all", "org/m"],
        ["--hf-token", "org/m"],
        ["--served-model-name", "a", "b", "tests"],
    ],
)
def test_a_list_does_not_take_the_model(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{argv[0]} takes the words behind it") as caught:
        parse_args(argv)
    assert "org/m" not in str(caught.value), "it may be a secret after all"
    assert parse_args(["org/x", *argv]).model == "org/x"


def test_several_values_of_one_flag() -> None:
    args = parse_args(["--api-key", "a", "b", "--api-key=c/d", "--served-model-name", "x", "y"])
    assert (args.api_key, args.served_model_name) == (["a", "b", "c/d"], ["x", "y"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serv", "--model", "x"], "unknown command 'serv', did you mean serve? A model of that"),
        (["serv", "org/m"], "unknown command 'serv', did you mean serve?"),
        (["server"], "did you mean serve?"),
        (["plann", "--model", "x"], "unknown command 'plann', did you mean plan?"),
        (["PLAN"], "did you mean plan?"),
        (["hlep"], "did you mean help?"),
        (["launch"], "pyserve has no command 'launch', only serve, plan, run-batch, chat, "),
        (["snapshot"], "pyserve has no command 'snapshot'"),
        (["a", "--model", "b"], "the model is given twice"),
    ],
)
def test_what_is_no_command(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    assert message in str(caught.value)


def test_names_of_models_that_look_like_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "config.json").write_text("{}")
    assert parse_args(["plans"]).model == "plans"
    for argv in (
        ["serve", "bench"],
        ["--model", "serv"],
        ["gpt2"],
        ["org/serve"],
        ["--port=1", "m"],
    ):
        assert parse_args(argv).model == argv[-1]


@pytest.mark.parametrize("argv", [["help"], ["help", "serve"], ["--help=all"], ["-h"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(argv)
    assert ended.value.code == 0 and "--max-model-len" in capsys.readouterr().out


def test_the_files_of_a_batch_are_told_from_the_server_s_flags() -> None:
    batch, others = flags.split_batch(
        ["org/m", "-i", "a", "--output_file=b", "--max-num-seqs", "7", "--enable-metrics",
         "--max_inflight=3", "-tp", "1"]
    )  # fmt: skip
    assert (batch.input_file, batch.output_file, batch.max_inflight) == (Path("a"), Path("b"), 3)
    assert batch.enable_metrics and others == ["org/m", "--max-num-seqs", "7", "-tp", "1"]
    for argv, message in (
        (["-i", "a"], "run-batch needs -o FILE"),
        (["-o", "a"], "run-batch needs -i FILE"),
        (["-i", "a", "-o", "b", "--max-inflight", "0"], "--max-inflight must be in [1, 4096]"),
    ):
        with pytest.raises(ConfigError) as caught:
            flags.split_batch(argv)
        assert message in str(caught.value)
