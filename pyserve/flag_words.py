"""plain_words: converts the forms of arguments that vLLM accepts to the one that argparse reads.

typed                           converted to
--max_model_len 5               --max-model-len 5
--enable-lora=False             --no-enable-lora; likewise --enable-lora false and --disable-lora
--hf-overrides.rope.theta 1     --hf-overrides={"rope.theta": "1"}, for vLLM's flags that take JSON;
                                for our own {"rope": {"theta": 1}}, and several merged into one
--help=all                      --help
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pyserve.errors import ConfigError
from pyserve.features import FLAGS
from pyserve.foreign_flags import JSON, NO_MEANING

_OBJECTS = {name: flag for name, flag in (FLAGS | NO_MEANING).items() if flag.form == JSON}
_OWN_OBJECTS = ("default-chat-template-kwargs",)
DICTIONARIES = {*_OBJECTS, *_OWN_OBJECTS}

# Flags whose value is JSON. -O was once a name of --compilation-config.
_TAKE_JSON = {"-O", *(f"--{name}" for name in DICTIONARIES)} | {
    flag.short for flag in _OBJECTS.values() if flag.short
}

_BOOL = {"true": True, "false": False}
_TWINS = (("--enable-", "--disable-"), ("--disable-", "--enable-"))


def plain_words(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Convert `argv` to the form that `parser` reads. Raises ConfigError."""
    switches = switch_names(parser)
    words = argv[::-1]
    found: list[str] = []
    entries: dict[str, dict[str, Any]] = {}
    while words:
        word = words.pop()
        if word == "--":
            return [*found, *_as_words(entries), word, *reversed(words)]
        name, equals, value = word.partition("=")
        head, dot, path = name.partition(".")
        if head.startswith("--"):
            head = head.replace("_", "-")
        if dot and head in _TAKE_JSON:
            if not equals:
                if not words:
                    raise ConfigError(f"{name[:100]} needs a value")
                value = words.pop()
            if head[2:] in _OWN_OBJECTS:
                entries.setdefault(head, {})
                _enter(entries[head], path.split("."), value, name=name)
            else:
                found.append(f"{head}={json.dumps({path: value})}")
        elif head in switches and not dot:
            if not equals and words and words[-1].lower() in _BOOL:
                equals, value = "=", words.pop()
            found.append(_switch(*switches[head], f"{head}{equals}", value))
        elif head == "--help":
            found.append(head)
        else:
            found.append(f"{head}{dot}{path}{equals}{value}")
    return [*found, *_as_words(entries)]


def _enter(entries: dict[str, Any], path: list[str], text: str, *, name: str) -> None:
    """Set the value at `path` in nested `entries`: `text` decoded as JSON, or `text` itself.

    Raises ConfigError, with the flag's `name`, where a part of the path has a value that is not an
    object.
    """
    for key in path[:-1]:
        inner = entries.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{name[:100]}: {key[:100]} is {json.dumps(inner)[:100]} already")
        entries = inner
    try:
        entries[path[-1]] = json.loads(text)
    except (ValueError, RecursionError):
        entries[path[-1]] = text


def _as_words(entries: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{head}={json.dumps(value)}" for head, value in entries.items()]


def switch_names(parser: argparse.ArgumentParser) -> dict[str, tuple[str, bool]]:
    """All spellings of switches: spelling -> (the switch, whether this turns it on)."""
    known = parser._option_string_actions
    switches: dict[str, tuple[str, bool]] = {}
    for action in parser._actions:
        if not isinstance(action, argparse.BooleanOptionalAction):
            continue
        switch = action.option_strings[0]
        for name in action.option_strings:
            switches[name] = switch, not name.startswith("--no-")
        for prefix, other in _TWINS:
            twin = other + switch.removeprefix(prefix)
            if switch.startswith(prefix) and twin not in known:
                switches[twin] = switch, False
                switches[f"--no-{twin[2:]}"] = switch, True
    return switches


def _switch(switch: str, is_on: bool, typed: str, value: str) -> str:
    if typed.endswith("="):
        if value.lower() not in _BOOL:
            raise ConfigError(
                f"{typed[:-1]} is a switch: it takes true or false, not {value[:100]!r}"
            )
        is_on = is_on == _BOOL[value.lower()]
    return switch if is_on else f"--no-{switch[2:]}"
