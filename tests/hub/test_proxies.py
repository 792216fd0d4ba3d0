"""Proxies of the environment: the forms that are read, and what is refused by name."""

from __future__ import annotations

import os

import pytest
from yarl import URL

from pyserve.errors import ConfigError
from pyserve.hub.proxies import Proxy, settle_proxies
from tests.hub.conftest import forget_proxies

HUB = URL("https://hub.example")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_proxies(monkeypatch)


@pytest.mark.parametrize(
    ("said", "url"),
    [
        ({"HTTPS_PROXY": "p.example:3128"}, "http://p.example:3128"),
        ({"https_proxy": "http://p.example"}, "http://p.example"),
        ({"ALL_PROXY": "http://p.example:1/"}, "http://p.example:1/"),
        ({"ALL_PROXY": "socks5://x:1", "HTTPS_PROXY": " p.example:3128 "}, "http://p.example:3128"),
        ({"HTTPS_PROXY": "u:w@p.example:3128"}, "http://u:w@p.example:3128"),
        ({"https_proxy": "[::1]:3128", "HTTPS_PROXY": "q:1"}, "http://[::1]:3128"),
    ],
)
def test_forms(said: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    proxy = settle_proxies(HUB)
    assert os.environ["https_proxy"] == url
    assert proxy is not None and proxy.variable in said and "w@" not in proxy.address
    assert settle_proxies(HUB) == Proxy("https_proxy", proxy.address), "once more changes nothing"


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle_proxies(HUB) is None and "https_proxy" not in os.environ
    monkeypatch.setenv("HTTPS_PROXY", "p.example:3128")
    monkeypatch.setenv("https_proxy", "")
    assert settle_proxies(HUB) is None and not os.environ["https_proxy"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "socks5://u:secret@p:1080",
            "HTTPS_PROXY names a SOCKS proxy .socks5., which .* set",
        ),
        ("socks5h://p:1080", "names a SOCKS proxy"),
        ("socks4://p", "names a SOCKS proxy"),
        ("https://p:3128", "HTTPS_PROXY names a proxy that is itself spoken to in TLS"),
        ("ftp://p:3128", "HTTPS_PROXY must be an address such as http://proxy.example:3128"),
        ("http://p:port", "must be an address"),
        ("http://", "must be an address"),
        ("http://u:secret@:99999999", "must be an address"),
    ],
)
def test_what_cannot_be_used(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ConfigError, match=message) as refusal:
        settle_proxies(HUB)
    assert "secret" not in str(refusal.value)
    assert settle_proxies(URL("http://hub.example")) is None, "it is for https addresses alone"
    monkeypatch.setenv("NO_PROXY", "hub.example")
    assert settle_proxies(HUB) is None
