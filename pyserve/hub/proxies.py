"""The proxies of the environment, in the one form that aiohttp reads.

It takes http://host:port from http_proxy and https_proxy and nothing else; curl and requests, whose
settings a machine has, take host:port and ALL_PROXY too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.request import proxy_bypass

from yarl import URL

from pyserve.errors import ConfigError

SCHEMES = ("http", "https")


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where requests go: `variable` names it, `address` is host:port, without a password."""

    variable: str
    address: str


def settle_proxies(endpoint: URL) -> Proxy | None:
    """Rewrite http_proxy and https_proxy so that aiohttp finds what they, or ALL_PROXY, name.

    Returns the proxy towards `endpoint`. Raises ConfigError where that one cannot be used.
    """
    towards: Proxy | None = None
    for scheme in SCHEMES:
        variable = _variable(scheme)
        if variable is None:
            continue
        is_used = scheme == endpoint.scheme and not proxy_bypass(endpoint.host or "")
        url = _url(variable, os.environ[variable].strip())
        if isinstance(url, ConfigError):
            if is_used:
                raise url
            continue
        os.environ[f"{scheme}_proxy"] = str(url)
        if is_used:
            towards = Proxy(variable, f"{url.host}:{url.port}")
    return towards


def _variable(scheme: str) -> str | None:
    """The variable that counts for URLs of a scheme, in the order in which curl asks; an empty one
    says that there is no proxy.
    """
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    found = next((name for name in names if name in os.environ), None)
    return found if found and os.environ[found].strip() else None


def _url(variable: str, text: str) -> URL | ConfigError:
    """The proxy's address; the error never shows it whole: it may hold a password."""
    if "://" not in text:
        text = f"http://{text}"
    try:
        url = URL(text)
        is_sound = bool(url.host) and url.port is not None
    except ValueError:
        return ConfigError(f"{variable} must be an address such as http://proxy.example:3128")
    if url.scheme.startswith("socks"):
        return ConfigError(
            f"{variable} names a SOCKS proxy ({url.scheme}), which pyserve does not speak: set "
            "HTTPS_PROXY to an http proxy, or fetch the model with another tool and pass its folder"
        )
    if url.scheme == "https":
        return ConfigError(
            f"{variable} names a proxy that is itself spoken to in TLS (https://), which pyserve "
            "does not do: most proxies are meant as http://, also for https addresses"
        )
    if url.scheme != "http" or not is_sound:
        return ConfigError(f"{variable} must be an address such as http://proxy.example:3128")
    return url
