"""The one logging set-up: short lines on stderr; libraries are heard from WARNING on."""

from __future__ import annotations

import logging
import sys


def setup(level: str) -> None:
    """Log from `level` ("debug", "info", ...) on; calling it again replaces the earlier set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    handler.set_name("pyserve")
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "pyserve"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    get_logger().setLevel(level.upper())


def get_logger() -> logging.Logger:
    """The logger of everything in pyserve."""
    return logging.getLogger("pyserve")
