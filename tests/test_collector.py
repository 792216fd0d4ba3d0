"""The collector rests where it is told to, and is as it was before afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from pyserve import collector


@pytest.mark.parametrize("was_enabled", [True, False])
def test_a_pause_ends_as_it_began(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    try:
        with pytest.raises(KeyError), collector.paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


def test_what_was_imported_is_never_looked_at_again() -> None:
    program = (
        "import gc; from pyserve import collector; before = gc.get_freeze_count()\n"
        "with collector.imports(): import http.client; assert not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > before + 1000"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
