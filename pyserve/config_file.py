"""Reads the file of --config: YAML whose keys are names of flags, as in vLLM.

Scalars are passed to the flags as they are written, so a name of 007 stays 007. Values are scalars
and lists; only flags that take a JSON object may have a nested mapping.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import yaml

from pyserve.errors import ConfigError
from pyserve.flag_rows import string_list
from pyserve.flag_words import DICTIONARIES, plain_words, switch_names
from pyserve.flags import given, make_parser, nearest, parse, words

MAX_BYTES = 2**20

_BOOL = "tag:yaml.org,2002:bool"
_TRUE = ("true", "yes", "on")
_NULL = "tag:yaml.org,2002:null"
Value = bool | str | list[str]


def with_settings(path: Path, argv: list[str]) -> list[str]:
    """`argv`, followed by the settings of the file that `argv` does not contain, as arguments.

    Raises ConfigError naming the file and the key.
    """
    said = given(argv)
    taken = {"model" if name == "positional_model" else name for name in said}
    parser = make_parser()
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("config", "help", "version")
    }
    for switch, (positive, _) in switch_names(parser).items():
        actions.setdefault(switch.removeprefix("--"), actions[positive.removeprefix("--")])
    added: list[str] = []
    for key, value in read_settings(path).items():
        where = f"--config {path}: {key[:100]}"
        name = key.replace("_", "-")
        action = actions.get(name)
        if action is None:
            raise ConfigError(f"{where} is not a setting{nearest(name, list(actions))}")
        if action.dest not in taken:
            added += _arguments(where, name, action, value)
    try:
        parse(parser, plain_words(parser, added))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    # The file's arguments come last: before argv, a list at their end would take the model's name
    # as one of its values.
    return [*words(argv), *added]


def read_settings(path: Path) -> dict[str, Value]:
    """Read a file: key -> text, bool or list of texts. Raises ConfigError naming line and key."""
    where = f"--config {path}"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"{where}: {os.strerror(error.errno or 0)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8 text") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{where} is longer than {MAX_BYTES} bytes")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where} is not YAML{line}") from None
    if root is None or root.tag == _NULL:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{where} must hold lines such as 'port: 8000'")
    settings: dict[str, Value] = {}
    for key, value in root.value:
        line = f"{where} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{line}: a key must be the name of a flag")
        if key.value in settings:
            raise ConfigError(f"{line}: {key.value[:100]} is given twice")
        said = f"{line}: {key.value[:100]}"
        if isinstance(value, yaml.MappingNode) and key.value.replace("_", "-") in DICTIONARIES:
            settings[key.value] = _object(said, value)
        else:
            settings[key.value] = _value(said, value)
    return settings


def _value(where: str, node: yaml.Node) -> Value:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not items or not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ConfigError(f"{where} must be a value or a list of values, nothing nested")
    if isinstance(node, yaml.SequenceNode):
        return [_text(where, item) for item in items]
    if node.tag == _NULL:
        raise ConfigError(f"{where} has no value")
    return node.value.lower() in _TRUE if node.tag == _BOOL else _text(where, node)


def _object(where: str, node: yaml.MappingNode) -> str:
    """A mapping as JSON text, which is what a flag that takes an object expects."""
    try:
        return json.dumps(yaml.SafeLoader("").construct_document(node), default=str)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise ConfigError(f"{where} is no object that JSON could hold") from None


def _text(where: str, node: yaml.ScalarNode) -> str:
    text = str(node.value)
    if "\0" in text:
        raise ConfigError(f"{where} holds a NUL character")  # impossible in a command's arguments
    return text


def _arguments(where: str, name: str, action: argparse.Action, value: Value) -> list[str]:
    """One setting as arguments. Raises ConfigError where its type does not suit the flag."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false")
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, bool) and action.nargs == "?":  # the flag may have no value
        return [f"--{name}"] if value else []
    if isinstance(value, bool):
        raise ConfigError(f"{where} must be a value, not true or false")
    if action.type is string_list:
        return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}"]
    values = value if isinstance(value, list) else [value]
    if isinstance(action, argparse._AppendAction):  # the form with "=" also allows leading dashes
        return [f"--{name}={item}" for item in values]
    if action.nargs in ("+", "*"):
        if bad := [item for item in values if item.startswith("-")]:
            raise ConfigError(f"{where}: {bad[0][:100]!r} must not begin with a dash")
        return [f"--{name}", *values]
    if isinstance(value, list):
        raise ConfigError(f"{where} takes one value, not a list")
    return [f"--{name}={value}"]
