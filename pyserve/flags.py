"""The flags: what they are called and what each may say.

Flag names are vLLM's. A flag that is not built yet is a start error naming it, a flag that has no
meaning here is accepted with a warning, and an unknown one is an error with the nearest name.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from pyserve import __version__, log
from pyserve.errors import ConfigError
from pyserve.flag_words import plain_words
from pyserve.foreign_flags import (
    ALIASES,
    INSTEAD,
    LIST,
    NEUTRAL,
    NO_EFFECT_YET,
    NO_MEANING,
    NOT_BUILT,
    SWITCH,
    VALUE,
)

# Read by the C library, the loader or the interpreter before pyserve is.
READ_TOO_EARLY = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")

COMMANDS = ("serve", "plan", "help")
COMMANDS_OF_VLLM = (
    "chat", "complete", "bench", "collect-env", "run-batch", "launch", "snapshot", "preload",
    "download-kernels",
)  # fmt: skip

_SIZE = re.compile(r"(-?[0-9]{1,18}(?:\.[0-9]{1,18})?)([kmgtKMGT]?)")
_HELP_WIDTH, _HELP_COLUMN = 100, 38


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises ConfigError naming the flag at fault."""
    parser = make_parser()
    args = parse(parser, words(argv))
    said = vars(args)
    for name in NOT_BUILT:
        value = said.pop(name, None)
        if value is not None and not _asks_for_nothing(name, value):
            instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
            raise ConfigError(f"--{name} is not built yet in pyserve {__version__}{instead}")
    if args.positional_model is not None and args.model is not None:
        raise ConfigError("the model is given twice: as an argument and with --model")
    if args.model is None:
        args.model = args.positional_model
    if args.model is None:
        _check_lists(parser, said)
    for name in NO_MEANING:
        if said.pop(name, None) is not None:
            log.get_logger().warning("--%s has no meaning in pyserve and is ignored", name)
    for name, why in NO_EFFECT_YET.items():
        if said.pop(name, None) is not None:
            log.get_logger().warning("--%s has no effect yet: %s", name, why)
    if args.seed is not None and args.load_format != "dummy":
        log.get_logger().warning(
            "--seed has no effect: it is for dummy weights, a request brings a seed of its own"
        )
    if args.revision is not None and args.model is None:
        log.get_logger().warning("--revision has no effect without --model")
    if args.tensor_parallel_size != 1:
        raise ConfigError(
            f"--tensor-parallel-size {args.tensor_parallel_size} is not built yet, the limit is 1"
        )
    args.api_key = [key for keys in args.api_key for key in keys]
    return args


def words(argv: list[str]) -> list[str]:
    """The arguments of the server in their one form, without the command. Raises ConfigError."""
    if argv[:1] == ["serve"]:
        argv = argv[1:]
    elif argv[:1] == ["help"]:
        argv = ["--help"]
    elif argv:
        _check_command(argv[0])
    return plain_words(make_parser(), argv)


def _check_command(word: str) -> None:
    """A command that is none must not be looked up on the hub as a model."""
    if word.startswith("-") or os.path.isfile(os.path.join(word, "config.json")):
        return
    if word in COMMANDS_OF_VLLM:
        raise ConfigError(f"pyserve has no command {word!r}, only {', '.join(COMMANDS)}")
    found = difflib.get_close_matches(word.lower(), COMMANDS, n=1, cutoff=0.75)
    if found:
        raise ConfigError(
            f"unknown command {word[:100]!r}, did you mean {found[0]}? "
            "A model of that name is given with --model"
        )


def _asks_for_nothing(name: str, value: object) -> bool:
    """Of the value of a flag that is not built."""
    neutral = NEUTRAL.get(name, ())
    if value is False or value in ("", "None", "{}", *neutral):
        return True
    try:
        return float(str(value)) in [float(other) for other in neutral]
    except ValueError:
        return False


def _check_lists(parser: argparse.ArgumentParser, said: dict[str, Any]) -> None:
    """Raises ConfigError where a flag has taken the name of the model for one of its values."""
    for action in parser._actions:
        value = said.get(action.dest)
        if not value or action.nargs not in ("+", "*", "?") or not action.option_strings:
            continue
        if isinstance(value, str):
            last = [value] if action.dest == "hf_token" else []
        elif isinstance(value, list):
            groups = value if isinstance(value[0], list) else [value]
            last = [group[-1] for group in groups if len(group) > 1]
        else:
            last = []
        if any("/" in word or os.path.isdir(word) for word in last):
            raise ConfigError(
                f"{action.option_strings[0]} takes the words behind it, and no model is named: is "
                "the last one the model? Name it with --model, or before the flags"
            )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """As `parser` says, but what is unknown is an error with the nearest name."""
    for word in argv:
        if "\0" in word or not _is_encodable(word):  # no path of this system, nor anything else
            raise ConfigError(f"{word[:100]!r} holds a character that no flag takes")
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            refuse_unknown(parser, word)
        raise ConfigError(f"unexpected argument {word!r}")
    return args


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def given(argv: list[str]) -> dict[str, Any]:
    """Only what the arguments say, without defaults: name with underscores -> value."""
    parse(make_parser(), words(argv))  # answers --help, which shows the defaults
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parse(parser, words(argv)))


class Parser(argparse.ArgumentParser):
    """argparse's, but what is wrong is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


class _HelpLines(argparse.HelpFormatter):
    """One line a flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN, width=_HELP_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = list(action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction):
            return names[1] if action.default else names[0]
        if action.nargs != 0:
            more = " ..." if action.nargs == "+" else ""
            names[-1] += f" {action.metavar or action.dest.upper()}{more}"
        return ", ".join(names)

    def _get_help_string(self, action: argparse.Action) -> str:
        # Python before 3.11 adds the default of a switch, which stands in brackets already.
        return (action.help or "").removesuffix(" (default: %(default)s)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the server's flags; those of vLLM that are only known by name are hidden."""
    parser = Parser(
        prog="python -m pyserve",
        usage="python -m pyserve [serve] [--model MODEL] [flags]\n"
        "       python -m pyserve plan --model MODEL   (what fits a card; see plan --help)",
        description="Serve a model on the OpenAI API. Without a model: the bundled demo model.",
        epilog="Defaults stand in brackets. Other flags of vLLM are known: those without meaning "
        "here give a warning,\nthose not built yet an error. Every switch has a --no- form.",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__, help="print it, end")
    parser.add_argument(
        "--config", type=path, metavar="FILE", help="YAML of flags: 'port: 8000'; flags given win"
    )
    parser.add_argument(
        "--env", type=_assignment, action="append", default=[], metavar="KEY=VALUE",
        help="set a variable of the environment; repeatable",
    )  # fmt: skip
    _add_model(parser.add_argument_group("model"))
    _add_engine(parser.add_argument_group("engine"))
    _add_server(parser.add_argument_group("server"))
    _add_requests(parser.add_argument_group("requests and logs"))
    forms = {**NOT_BUILT, **NO_MEANING, **dict.fromkeys(NO_EFFECT_YET, VALUE)}
    for name, form in forms.items():
        _add_silent(parser, name, form)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return _HelpLines(prog)


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", help="a folder, or a name on the hub: org/name [the demo model]")
    add(
        "--tokenizer", type=optional_text, metavar="MODEL",
        help="folder or hub name of the tokenizer [the model's]",
    )  # fmt: skip
    add(
        "--revision", type=optional_text, metavar="REV",
        help="branch, tag or commit on the hub [main]",
    )  # fmt: skip
    add("--download-dir", type=path, metavar="DIR", help="where downloads are kept [HF_HOME]")
    add(
        "--hf-token", type=optional_text, nargs="?", const=True, metavar="TOKEN",
        help="access token of the hub [HF_TOKEN, or hf auth login's]",
    )  # fmt: skip
    add(
        "--load-format", choices=["auto", "safetensors", "dummy"], default="auto", metavar="FORMAT",
        help="auto, safetensors or dummy: random weights [auto]",
    )  # fmt: skip
    add(
        "--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"],
        default="auto", metavar="TYPE", help="auto, float16, bfloat16 or float32 [auto]",
    )  # fmt: skip
    add(
        "--chat-template", type=optional_text, metavar="FILE",
        help="file or text of another chat template [model's]",
    )  # fmt: skip
    add(
        "--generation-config", default="auto", metavar="FROM",
        help="sampling: auto: the model's defaults; vllm: none; a folder [auto]",
    )  # fmt: skip
    add("--seed", type=int, metavar="N", help="of dummy weights [0]")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto, cpu or cuda; auto: a card where there is one [auto]", metavar="DEVICE",
    )  # fmt: skip
    add("--max-model-len", type=context, metavar="N", help="context: 4096, 32k [what fits]")
    add(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="PART",
        help="of the card's memory, others' use included [0.9]",
    )  # fmt: skip
    add(
        "--device-memory-utilization", type=float, dest="gpu_memory_utilization",
        default=argparse.SUPPRESS, help=argparse.SUPPRESS,
    )  # fmt: skip
    add(
        "--kv-cache-memory-bytes", type=optional_size, metavar="N",
        help="KV cache at most: 4G (4 GiB) [what is left]",
    )  # fmt: skip
    add("--max-num-seqs", type=int, default=256, metavar="N", help="run at once [256]")
    add(
        "--max-num-batched-tokens", type=size, metavar="N",
        help="a step; [8192 on a card of 40 GB or more, else 2048]",
    )  # fmt: skip
    add("--block-size", type=int, default=16, metavar="N", help="tokens in a KV block [16]")
    add(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="do not keep what prompts have in common [kept]",
    )  # fmt: skip
    add(
        "--scheduling-policy", choices=["fcfs", "priority"], default="fcfs", metavar="POLICY",
        help="fcfs: first come first served; or priority [fcfs]",
    )  # fmt: skip
    add("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N", help="only 1 yet [1]")
    add(
        "--allow-reference-ops", action=argparse.BooleanOptionalAction, default=False,
        help="serve slowly, by plain torch, without a compiler [off]",
    )  # fmt: skip


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    # No defaults: --uds must know whether they were given.
    add("--host", type=optional_text, help="address to listen on [0.0.0.0]")
    add("--port", type=int, help="0: any that is free [8000]")
    add("--uds", type=path, metavar="PATH", help="a Unix socket in place of host and port")
    add("--ssl-certfile", type=path, metavar="FILE", help="serve TLS with this chain (PEM)")
    add("--ssl-keyfile", type=path, metavar="FILE", help="its key, no password [in the chain]")
    add(
        "--api-key", type=_key, action="append", nargs="+", default=[], metavar="KEY",
        help="clients must send one of them [VLLM_API_KEY]",
    )  # fmt: skip
    add(
        "--share-prefix-cache", action=argparse.BooleanOptionalAction, default=False,
        help="of several keys: one cache of prompts for all [each its own]",
    )  # fmt: skip
    add(
        "--served-model-name", nargs="+", metavar="NAME",
        help="what clients may call the model [what --model says]",
    )  # fmt: skip
    add(
        "--root-path", type=optional_text, metavar="PATH",
        help="prefix that a proxy leaves on, as /llm",
    )  # fmt: skip
    everything = ["*"]
    for name, what in (("origins", "web pages"), ("methods", "methods"), ("headers", "headers")):
        add(
            f"--allowed-{name}", type=string_list, default=everything, metavar="JSON",
            help=f"CORS: list of {what} [[\"*\"]]",
        )  # fmt: skip
    add(
        "--allow-credentials", action=argparse.BooleanOptionalAction, default=False,
        help="CORS: cookies too; needs named origins [off]",
    )  # fmt: skip
    add("--ready-file", type=path, metavar="FILE", help="exists while the server is ready")
    add(
        "--shutdown-timeout", type=float, default=30.0, metavar="S",
        help="for requests to finish at the end [30]",
    )  # fmt: skip


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-queue", type=int, metavar="N", help="wait at most, then 429 [4 x --max-num-seqs]")
    add(
        "--request-timeout", type=float, default=3600.0, metavar="S",
        help="a request takes at most, 0: any time [3600]",
    )  # fmt: skip
    add(
        "--trust-request-chat-template", action=argparse.BooleanOptionalAction, default=False,
        help="run templates that requests bring [off]",
    )  # fmt: skip
    add(
        "--log-level", type=str.lower, choices=["debug", "info", "warning", "error", "critical"],
        default="info", metavar="LEVEL", help="debug, info, warning, error or critical [info]",
    )  # fmt: skip
    add(
        "--enable-log-requests", action=argparse.BooleanOptionalAction, default=False,
        help="a line for each request's parameters, never texts [off]",
    )  # fmt: skip
    add(
        "--disable-log-stats", action=argparse.BooleanOptionalAction, default=False,
        help="no line of statistics every 10 s [off]",
    )  # fmt: skip


def _add_silent(parser: argparse.ArgumentParser, name: str, form: str) -> None:
    names = [f"--{name}"] + ([ALIASES[name]] if name in ALIASES else [])
    options: dict[str, Any] = {"dest": name, "default": None, "help": argparse.SUPPRESS}
    if form == SWITCH:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
    # That there is no value behind it is not worth an error of its own.
    elif form == LIST:
        parser.add_argument(*names, nargs="*", **options)
    else:
        parser.add_argument(*names, nargs="?", const=True, **options)


def refuse_unknown(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """Raises ConfigError with the nearest name that `parser` knows."""
    name = word.partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    raise ConfigError(f"unknown flag {name[:100]}{nearest(name, known)}")


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {found[0]}?" if found else ""


def size(text: str) -> int:
    """A number: 4096, 32k (32,000), 25.6k or 32K (32,768), and m, g and t, as vLLM reads them."""
    match = _SIZE.fullmatch(text.strip())
    number, suffix = match.groups() if match else ("", "")
    if not match or ("." in number and not suffix.islower()):
        raise argparse.ArgumentTypeError(
            f"must be a number such as 4096, 32k (32,000) or 32K (32,768), got {text[:100]!r}"
        )
    power = "kmgt".find(suffix.lower()) + 1 if suffix else 0
    return int(Decimal(number) * (1000 if suffix.islower() else 1024) ** power)


def context(text: str) -> int | None:
    """A size, or "auto" or -1: what fits."""
    return None if text.strip().lower() in ("auto", "-1") else size(text)


def optional_text(text: str) -> str | None:
    """Nothing and "None" are what vLLM takes for a flag that was not given."""
    return None if text in ("", "None") else text


def optional_size(text: str) -> int | None:
    """A size, or as optional_text."""
    return None if text in ("", "None") else size(text)


def path(text: str) -> Path | None:
    """A path, with ~ for the home folder: shells expand it only at the start of a word.

    "None" is as optional_text has it; an empty one is refused, as a path that got lost.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if text == "None":
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no such home folder: {text[:200]}") from None


def _key(text: str) -> str:
    # vLLM takes it for no key at all; as a key it would be easily guessed.
    if text == "None":
        raise argparse.ArgumentTypeError("must not be None: leave the flag away, or give a key")
    return text


def string_list(text: str) -> list[str]:
    """A JSON list of strings."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"must be a JSON list such as '[\"*\"]', got {text[:200]}")
    return value


def _assignment(text: str) -> tuple[str, str]:
    """KEY=VALUE; the value is never shown: it may be a secret."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name, re.ASCII):
        raise argparse.ArgumentTypeError(
            "must be KEY=VALUE, with a key of letters, digits and underscores"
        )
    if name.startswith(READ_TOO_EARLY):
        raise argparse.ArgumentTypeError(
            f"{name} is read before pyserve is: set it before the command"
        )
    return name, value
