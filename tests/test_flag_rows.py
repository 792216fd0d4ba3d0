"""A row is all that a flag needs: parser, help, limits, `plan` and settings follow from it."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pyserve import flags
from pyserve.config import EngineConfig, LaunchConfig, ServerConfig
from pyserve.errors import ConfigError
from pyserve.flag_rows import Row, flag, rows_of, settings, size
from pyserve.plan import command

Kind = Literal["plain", "fancy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One flag of every form."""

    GROUP = "made"

    number: int = flag(3, "a number", limits=(1, 9))
    part: float = flag(0.5, "a part", metavar="PART")
    kind: Kind = flag("plain", "of two", synonyms={"posh": "fancy"})
    tokens: int | None = flag(None, "a size", shown="what fits", read=size)
    folder: Path | None = flag(None, "a folder")
    names: tuple[str, ...] = flag((), "names", name="name", shown="", options={"nargs": "+"})
    methods: tuple[str, ...] = flag(("*",), "a list")
    keeps: bool = flag(False, "keep it")
    talks: bool = flag(True, "be silent", name="silence", is_negated=True)
    text: str = flag("", "a text", group="others", short="-t")
    inner: int = 7


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(formatter_class=flags._HelpLines)
    for row in rows_of(Made).values():
        flags.add_flag(made, row)
    return made


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--number", "8", "--part", "1"], {"number": 8, "part": 1.0}),
        (["--kind", "posh"], {"kind": "fancy"}),
        (["--kind", "plain", "--tokens", "2k"], {"kind": "plain", "tokens": 2000}),
        (["--folder", "/a", "-t", "x"], {"folder": Path("/a"), "text": "x"}),
        (["--folder", "None", "-t", "None"], {}),
        (["--keeps", "--silence"], {"keeps": True, "talks": False}),
        (["--no-keeps", "--no-silence"], {}),
        (["--methods", '["GET"]'], {"methods": ("GET",)}),
    ],
)
def test_what_is_said_becomes_a_setting(
    parser: argparse.ArgumentParser, argv: list[str], expected: dict[str, object]
) -> None:
    made = Made(**settings(rows_of(Made), parser.parse_args(argv)))
    assert dataclasses.asdict(made) == dataclasses.asdict(Made()) | expected


def test_the_help_shows_the_defaults_of_the_fields(parser: argparse.ArgumentParser) -> None:
    lines = parser.format_help().partition("exit\n")[2].splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "--number N a number [3]",
        "--part PART a part [0.5]",
        "--kind KIND of two [plain]",
        "--tokens N a size [what fits]",
        "--folder FILE a folder",
        "--name JSON ... names",
        '--methods JSON a list [["*"]]',
        "--keeps keep it [off]",
        "--silence be silent [off]",
        "--text, -t TEXT a text",
    ]


def test_what_follows_from_the_field() -> None:
    rows = rows_of(Made)
    assert rows["kind"].choices == ("plain", "fancy", "posh")
    assert (rows["number"].name, rows["names"].name) == ("number", "name")
    assert (rows["number"].group, rows["text"].group) == ("made", "others")
    assert "inner" not in rows


CONFIGS = (LaunchConfig, EngineConfig, ServerConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_a_flag_but_what_no_user_sets(config: type) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields - set(rows_of(config)) <= {"model_path", "answer_ids", "max_body_bytes"}


@pytest.mark.parametrize(
    ("config", "field"),
    [(config, field) for config in CONFIGS for field, row in rows_of(config).items() if row.limits],
)
def test_limits_of_a_row_are_those_of_the_setting(config: type, field: str) -> None:
    row = rows_of(config)[field]
    assert row.limits is not None
    others = {"model_path": Path("m")} if config is EngineConfig else {"served_model_names": ("m",)}
    for value in row.limits:
        config(**others, **{field: value})
    for value in (row.limits[0] - 1, row.limits[1] + 1):
        with pytest.raises(ConfigError) as caught:
            config(**others, **{field: value})
        low, high = row.limits
        assert str(caught.value) == f"--{row.name} must be in [{low}, {high}], got {value}"


@pytest.mark.parametrize("name", command.SHARED_FLAGS)
def test_plan_takes_the_server_s_flags_as_the_server_does(name: str) -> None:
    def form(parser: argparse.ArgumentParser) -> tuple[object, ...]:
        (action,) = (a for a in parser._actions if f"--{name}" in a.option_strings)
        return action.type, action.default, action.choices, action.help, action.nargs

    assert form(command._parser()) == form(flags.make_parser())


def test_every_row_is_in_the_parser_once() -> None:
    names = [row.name for config in CONFIGS for row in rows_of(config).values()]
    assert len(names) == len(set(names)) == len(flags.ROWS)
    assert isinstance(flags.ROWS["port"], Row) and flags.ROWS["port"].default == 8000
