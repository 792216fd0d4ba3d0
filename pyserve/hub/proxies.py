"""Converts the proxy variables of the environment to the one form that aiohttp reads.

aiohttp reads only http://host:port, from http_proxy and https_proxy. Machines are set up for curl
and requests, which also accept host:port without a scheme, and ALL_PROXY.
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
    """A proxy: the environment variable that names it, and its host:port without a password."""

    variable: str
    address: str


def settle_proxies(endpoint: URL) -> Proxy | None:
    """Set http_proxy and https_proxy to what they or ALL_PROXY name, in the form aiohttp reads.

    Returns the proxy for requests to `endpoint`, None where there is none. Raises ConfigError
    where that one cannot be used.
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
    """The variable that names the proxy for URLs of `scheme`, in curl's order of precedence.

    None where there is no proxy; a variable that is set but empty means that, too.
    """
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    found = next((name for name in names if name in os.environ), None)
    return found if found and os.environ[found].strip() else None


def _url(variable: str, text: str) -> URL | ConfigError:
    """Parse `text`, the value of `variable`. Errors do not show it, as it may hold a password."""
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
