"""A browser for the tests of the page, and a host that it must never ask."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.api.fakes import Server
from tests.api.pages.browser import Browser, Tab
from tests.api.pages.visit import DESKTOP, open_page


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tab(browser: Browser, server: Server) -> Iterator[Tab]:
    """The page of `server`, ready, on a desktop. Nothing may be amiss with it at the end."""
    server.engine.room = None
    with browser.tab() as found:
        found.view(*DESKTOP)
        open_page(found, server)
        yield found
        assert found.problems == []


@pytest.fixture
def elsewhere() -> Iterator[socket.socket]:
    """Another host, as the page sees it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock
