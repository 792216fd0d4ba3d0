"""The logging set-up: level, one handler, libraries quiet."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from pyserve import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    levels = root.level, log.get_logger().level
    handlers = list(root.handlers)
    yield
    root.setLevel(levels[0])
    log.get_logger().setLevel(levels[1])
    root.handlers[:] = handlers


def test_an_event_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.get_logger().info("%d tokens", 5)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO 5 tokens\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("level", "heard"),
    [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")],
)
def test_lines_below_the_level_are_dropped(
    capsys: pytest.CaptureFixture[str], level: str, heard: str
) -> None:
    log.setup(level)
    logger = log.get_logger()
    for say in (logger.debug, logger.info, logger.warning, logger.error):
        say(say.__name__[0])
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == heard


def test_libraries_are_heard_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("debug")
    library = logging.getLogger("aiohttp.access")
    library.info("GET / 200")
    library.warning("odd")
    assert capsys.readouterr().err.endswith("WARNING odd\n")


def test_setting_up_again_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.setup("info")
    log.get_logger().info("once")
    assert capsys.readouterr().err.count("once") == 1
