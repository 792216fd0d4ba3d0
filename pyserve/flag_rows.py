"""Row: all about one flag: its name, values, default, limits and help.

A row is attached to the field that the flag sets, of a config class in config.py. The parsers of
the server and of `plan`, the keys of a --config file, the help and the checks are made from rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ADAPTERS, REQUESTS, BATCHES = "adapters", "requests and logs", "batches"  # groups of --help

# Prefixes of variables that the C library, the dynamic linker or the interpreter reads before
# pyserve could set them.
READ_TOO_EARLY = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")

_SIZE = re.compile(r"(-?[0-9]{1,18}(?:\.[0-9]{1,18})?)([kmgtKMGT]?)")


class LoraModule(NamedTuple):
    """The name by which requests choose an adapter, and its path or repository."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Row:
    """One flag. Where name, group, read, metavar or choices are left out, the field gives them.

    default      default of the setting; if it is a bool, the flag is a switch
    help         help text without the default, which --help adds in brackets
    shown        what --help shows in the brackets; None: the default itself
    name         the flag as it is typed, without the dashes
    group        its group in --help; None: the GROUP of the config class
    metavar      what --help calls its value
    read         converts text to a value. Raises ArgumentTypeError.
    choices      the values that are allowed; empty: any
    synonyms     further values that are allowed -> the values that they stand for
    limits       the smallest and the largest value
    is_negated   the switch turns the setting off
    short        a further name, with its dash
    also         a further name, without dashes, that --help does not show
    options      further arguments for argparse
    """

    default: Any
    help: str
    shown: str | None = None
    name: str = ""
    group: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: tuple[int, int] | None = None
    is_negated: bool = False
    short: str | None = None
    also: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dest(self) -> str:
        """Name of the flag's attribute in the parsed arguments."""
        return self.name.replace("-", "_")

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def parsed_default(self) -> Any:
        """The parsed value of a flag that was not given; None: the default of the field applies."""
        return self.default != self.is_negated if self.is_switch else None

    @property
    def full_help(self) -> str:
        """The help text with the default."""
        shown = self.shown
        if shown is None and self.default is not None:
            shown = _as_shown(self.parsed_default if self.is_switch else self.default)
        return f"{self.help} [{shown}]" if shown else self.help

    def value(self, said: Any) -> Any:
        """Convert `said`, the value that argparse returned, to the value of the setting."""
        if self.is_negated:
            return not said
        if isinstance(said, list):
            return tuple(said)
        return self.synonyms.get(said, said) if self.synonyms else said


def _as_shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return json.dumps(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def flag(default: Any, help: str, shown: str | None = None, **row: Any) -> Any:
    """A dataclass field that a flag sets; `row` are further fields of its Row.

    default  default of the field; MISSING: the flag is required.
    """
    known = None if default is dataclasses.MISSING else default
    metadata = {"row": Row(known, help, shown, **row)}
    return dataclasses.field(default=default, metadata=metadata)


@cache
def rows_of(config_class: Any) -> dict[str, Row]:
    """The rows of all fields of a dataclass that flags set: field name -> row."""
    types = typing.get_type_hints(config_class)
    rows = {}
    for field in dataclasses.fields(config_class):
        if "row" in field.metadata:
            row: Row = field.metadata["row"]
            name = row.name or field.name.removesuffix("_s").replace("_", "-")  # _s: seconds
            group = config_class.GROUP if row.group is None else row.group
            row = dataclasses.replace(row, name=name, group=group)
            rows[field.name] = _typed(row, types[field.name])
    return rows


def _typed(row: Row, kind: Any) -> Row:
    """`row`, with choices, read and metavar completed from `kind`, the type of its field."""
    words = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return dataclasses.replace(row, choices=(*words, *row.synonyms))
    kind = typing.get_origin(kind) if typing.get_origin(kind) is tuple else (*words, kind)[0]
    read, metavar = _BY_TYPE.get(kind, (kind, None))
    return dataclasses.replace(row, read=row.read or read, metavar=row.metavar or metavar)


def settings(rows: Mapping[str, Row], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given: field name -> value. Others are left to the field's default."""
    said = {field: getattr(args, row.dest, None) for field, row in rows.items()}
    return {field: rows[field].value(value) for field, value in said.items() if value is not None}


def size(text: str) -> int:
    """Read a number such as 4096, 32k (32,000), 25.6k or 32K (32,768), as vLLM does.

    The suffixes m, M, g, G, t and T work likewise.
    """
    match = _SIZE.fullmatch(text.strip())
    number, suffix = match.groups() if match else ("", "")
    if not match or ("." in number and not suffix.islower()):
        raise argparse.ArgumentTypeError(
            f"must be a number such as 4096, 32k (32,000) or 32K (32,768), got {text[:100]!r}"
        )
    power = "kmgt".find(suffix.lower()) + 1 if suffix else 0
    return int(Decimal(number) * (1000 if suffix.islower() else 1024) ** power)


def context(text: str) -> int | None:
    """Read a size as a context length; None for "auto" or -1, which mean what fits."""
    return None if text.strip().lower() in ("auto", "-1") else size(text)


def optional_text(text: str) -> str | None:
    """Read text; None for "" and "None", which count as a flag that was not given, as in vLLM."""
    return None if text in ("", "None") else text


def optional_size(text: str) -> int | None:
    """Read a size; None for "" and "None"."""
    return None if text in ("", "None") else size(text)


def quantization(text: str) -> str | None:
    """Read a quantization method; None for "" and "None". Also accepts vLLM's "_marlin" names."""
    method = text.removesuffix("_marlin")
    if method not in ("", "None", "awq", "gptq", "compressed-tensors", "fp8"):
        raise argparse.ArgumentTypeError(
            f"must be awq, gptq, compressed-tensors or fp8, got {text}"
        )
    return None if method in ("", "None") else method


def path(text: str) -> Path | None:
    """Read a path; None for "None".

    ~ is expanded here because shells only expand it at the start of a word, and not after
    "--flag=". An empty path is refused, as it is probably an unset variable.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if text == "None":
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no such home folder: {text[:200]}") from None


def url_prefix(text: str) -> str | None:
    """Read a URL path; returned with a slash at its start and none at its end, None if empty."""
    prefix = (optional_text(text) or "").strip("/")
    return f"/{prefix}" if prefix else None


def key(text: str) -> str:
    """Read an API key. Raises ArgumentTypeError for "None"."""
    # For vLLM "None" means no key at all. As a key it would be easy to guess.
    if text == "None":
        raise argparse.ArgumentTypeError("must not be None: leave the flag away, or give a key")
    return text


def string_list(text: str) -> list[str]:
    """Read a JSON list of strings."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"must be a JSON list such as '[\"*\"]', got {text[:200]}")
    return value


def json_object(text: str) -> dict[str, Any] | None:
    """Read a JSON object; None for "" and "None"."""
    if optional_text(text) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"must be a JSON object such as '{{\"a\": true}}', got {text[:200]}"
        )
    return value


def lora_module(text: str) -> LoraModule:
    """Read NAME=PATH, or JSON such as {"name": "sql", "path": "./sql"}.

    The JSON may have vLLM's other two keys, base_model_name and is_3d_lora_weight.
    """
    before, equals, behind = text.partition("=")
    if equals and "," not in text:
        module: dict[str, Any] = {"name": before, "path": behind}
    else:
        try:
            module = json.loads(text)
        except (ValueError, RecursionError):
            module = {}
    known = ("name", "path", "base_model_name", "is_3d_lora_weight")
    if not isinstance(module, dict) or not set(module) <= set(known):
        module = {}
    name, path = module.get("name"), module.get("path")
    if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
        raise argparse.ArgumentTypeError(
            f'must be NAME=PATH, or JSON as {{"name": "sql", "path": "./sql"}}, got {text[:200]}'
        )
    if not name.isprintable():
        raise argparse.ArgumentTypeError(f"a name must be of printable characters, got {name!r}")
    if module.get("is_3d_lora_weight"):
        raise argparse.ArgumentTypeError("is_3d_lora_weight is of experts, which have no adapters")
    return LoraModule(name, path)


def assignment(text: str) -> tuple[str, str]:
    """Read KEY=VALUE. Errors do not show the value, because it may be a secret."""
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


# Type of a setting -> the function that reads it, and what --help calls its value.
_BY_TYPE: dict[type, tuple[Callable[[str], Any], str | None]] = {
    int: (int, "N"),
    float: (float, "S"),
    str: (optional_text, None),
    Path: (path, "FILE"),
    tuple: (string_list, "JSON"),
}
