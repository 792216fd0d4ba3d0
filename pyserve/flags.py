"""The parser of the server's flags.

Flag names are vLLM's. A flag that is not built yet is an error that names it. A flag of vLLM that
has no meaning here is accepted with a warning. An unknown flag is an error that suggests the
nearest name.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
from typing import Any, NoReturn

from pyserve import __version__, log
from pyserve.config import BatchConfig, EngineConfig, LaunchConfig, ServerConfig
from pyserve.errors import ConfigError
from pyserve.features import FLAGS
from pyserve.flag_rows import ADAPTERS, BATCHES, REQUESTS, Row, rows_of, settings
from pyserve.flag_words import plain_words
from pyserve.foreign_flags import JSON, LIST, NO_MEANING, SWITCH, Flag

COMMANDS = ("serve", "plan", "run-batch", "chat", "complete", "bench", "collect-env", "help")
COMMANDS_OF_VLLM = ("launch", "snapshot", "preload", "download-kernels")

GROUPS = ("model", "engine", ADAPTERS, "server", REQUESTS, BATCHES)  # groups of --help, in order
LAUNCH, ENGINE, SERVER = rows_of(LaunchConfig), rows_of(EngineConfig), rows_of(ServerConfig)
BATCH = rows_of(BatchConfig)
ROWS = {row.name: row for rows in (LAUNCH, ENGINE, SERVER) for row in rows.values()}

_HELP_WIDTH, _HELP_COLUMN = 100, 38


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the server's flags. Raises ConfigError naming the flag at fault."""
    parser = make_parser()
    args = parse(parser, words(argv))
    said = vars(args)
    for name, flag in FLAGS.items():
        value = said.pop(name, None)
        if value is None:
            continue
        if flag.ignored is not None:
            log.get_logger().warning("--%s has no effect yet: %s", name, flag.ignored)
        elif not _asks_for_nothing(flag, value):
            instead = f": {flag.instead}" if flag.instead else ""
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
    if args.seed is not None and args.load_format != "dummy":
        log.get_logger().warning(
            "--seed has no effect: it is for dummy weights, a request brings a seed of its own"
        )
    if args.revision is not None and args.model is None:
        log.get_logger().warning("--revision has no effect without --model")
    if not args.enable_lora:
        for name in ("max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype"):
            if said[name] is not None:
                flag_name = name.replace("_", "-")
                log.get_logger().warning("--%s has no effect without --enable-lora", flag_name)
    args.api_key = [key for keys in args.api_key or () for key in keys]
    return args


def split_batch(argv: list[str]) -> tuple[BatchConfig, list[str]]:
    """Parse the flags of `run-batch` alone; returns its config and the rest, the server's flags.

    Raises ConfigError naming the flag at fault.
    """
    parser = Parser(
        prog="python -m pyserve run-batch",
        usage="python -m pyserve run-batch -i FILE -o FILE [--model MODEL] [flags]",
        description="Answer a file of requests without serving a port; killed, the same command "
        "goes on where it was.",
        epilog="Every flag of the server (python -m pyserve --help) is one here too.\n"
        "Exit codes: 0: every line is answered; 3: some of the answers are errors; 1: the same "
        "command goes on with the rest; 2: a wrong flag.",
        formatter_class=_HelpLines,
        allow_abbrev=False,
    )
    for row in BATCH.values():
        add_flag(parser, row)
    args, others = parser.parse_known_args(plain_words(parser, argv))
    for name, short in (("input_file", "-i"), ("output_file", "-o")):
        if getattr(args, name) is None:
            raise ConfigError(f"run-batch needs {short} FILE (see run-batch --help)")
    return BatchConfig(**settings(BATCH, args)), others


def words(argv: list[str]) -> list[str]:
    """Remove the command from `argv` and convert the rest with plain_words. Raises ConfigError."""
    if argv[:1] == ["serve"]:
        argv = argv[1:]
    elif argv[:1] == ["help"]:
        argv = ["--help"]
    elif argv:
        _check_command(argv[0])
    return plain_words(make_parser(), argv)


def _check_command(word: str) -> None:
    """Refuse a mistyped command, which would otherwise be taken for a model name on the hub."""
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


def _asks_for_nothing(flag: Flag, value: object) -> bool:
    """Whether `value`, of a flag that is not built, would change nothing."""
    if flag.form == JSON and isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.dumps(json.loads(value))
    if value is False or value in ("", "None", "{}", *flag.neutral):
        return True
    try:
        return float(str(value)) in [float(other) for other in flag.neutral]
    except ValueError:
        return False


def _check_lists(parser: argparse.ArgumentParser, said: dict[str, Any]) -> None:
    """Raise ConfigError where a flag that takes a list has probably taken the model as its last
    value.
    """
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
        words_of_it = [word for word in last if isinstance(word, str)]
        if any("/" in word or os.path.isdir(word) for word in words_of_it):
            raise ConfigError(
                f"{action.option_strings[0]} takes the words behind it, and no model is named: is "
                "the last one the model? Name it with --model, or before the flags"
            )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse `argv`. Raises ConfigError, which for an unknown flag suggests the nearest name."""
    for word in argv:
        if "\0" in word or not _is_encodable(word):  # valid in no value of any flag
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
    """The values of the flags that are given, without defaults: name with underscores -> value."""
    parse(make_parser(), words(argv))  # handles --help, which needs the defaults removed below
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parse(parser, words(argv)))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for each error. Raises ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


class _HelpLines(argparse.HelpFormatter):
    """Formats --help with one line per flag."""

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
        # Python before 3.11 appends the default of a switch, which our help already has.
        return (action.help or "").removesuffix(" (default: %(default)s)")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the server's flags. vLLM's flags that have no effect here are hidden."""
    parser = Parser(
        prog="python -m pyserve",
        usage="python -m pyserve [serve] [--model MODEL] [flags]\n"
        "       python -m pyserve plan --model MODEL   (what fits a card; see plan --help)\n"
        "       python -m pyserve run-batch -i FILE -o FILE   (requests of a file)\n"
        "       python -m pyserve chat | complete | bench serve   (ask a running server)",
        description="Serve a model on the OpenAI API. Without a model: the bundled demo model.",
        epilog="[default]. vLLM's other flags give a warning or, if not built yet, an error. "
        "Switches have --no-.",
        formatter_class=_HelpLines,
        allow_abbrev=False,
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__, help="print it, end")
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for row in ROWS.values():
        group = groups.get(row.group or "", parser)
        add_flag(group, row)
        if row.also is not None:
            also = group.add_argument(
                f"--{row.also}", dest=row.dest, type=row.read or str, choices=row.choices or None
            )
            also.default = also.help = argparse.SUPPRESS
    for name, flag in (FLAGS | NO_MEANING).items():
        _add_silent(parser, name, flag)
    return parser


def add_flag(parser: argparse._ActionsContainer, row: Row) -> None:
    """Add the flag that a row describes."""
    names = [f"--{row.name}", *([row.short] if row.short else [])]
    options = {"default": row.parsed_default, "help": row.full_help, **row.options}
    if row.is_switch:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        return
    options |= {"type": row.read or str, "choices": row.choices or None, "metavar": row.metavar}
    parser.add_argument(*names, **options)


def _add_silent(parser: argparse.ArgumentParser, name: str, flag: Flag) -> None:
    names = [f"--{name}", *([flag.short] if flag.short else [])]
    options: dict[str, Any] = {"dest": name, "default": None, "help": argparse.SUPPRESS}
    if flag.form == SWITCH:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
    # The value may be missing, as the flag is refused or ignored anyway.
    elif flag.form == LIST:
        parser.add_argument(*names, nargs="*", **options)
    else:
        parser.add_argument(*names, nargs="?", const=True, **options)


def refuse_unknown(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """Raise ConfigError for an unknown flag, with the nearest name that `parser` knows."""
    name = word.partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    raise ConfigError(f"unknown flag {name[:100]}{nearest(name, known)}")


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name, which suggests the nearest one; "" if none is."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {found[0]}?" if found else ""
