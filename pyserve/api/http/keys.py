"""API keys: who asks. A user is a name with its keys, or a key without a name (config.py).

What is scarce is shared between clients: the keys, or the addresses where all have the same key or
none. A proxy is one address, whoever stands behind it: headers that name others can be forged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from aiohttp import web

from pyserve.config import UNNAMED

USER = web.RequestKey("user", str)  # of a request that was let in
CLIENT = web.RequestKey("client", str)  # likewise: with whom it shares what is scarce
IS_BACKGROUND = web.RequestKey("is_background", bool)  # it gives way to all others


class Keys:
    """The API keys, compared in constant time.

    keys        user and key of each.
    is_shared   users get the prefix cache of each other's prompts.
    users       each once, in the order of their keys.
    """

    def __init__(self, keys: Sequence[tuple[str, str]], *, is_shared: bool = False) -> None:
        self._digests = [(user, hashlib.sha256(key.encode()).digest()) for user, key in keys]
        self._is_shared = is_shared
        self.users = tuple(dict.fromkeys(user for user, _ in keys))

    def user(self, request: web.Request) -> str | None:
        """Who asks, "" where no key is needed, None: nobody known.

        The key comes as a Bearer token, as OpenAI's clients send it, or in x-api-key, as
        Anthropic's do.
        """
        if not self._digests:
            return ""
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        by_bearer = self._user_of(bearer)
        by_header = self._user_of(request.headers.get("x-api-key", ""))
        if scheme.lower() == "bearer" and by_bearer is not None:
            return by_bearer
        return by_header

    def client(self, request: web.Request, user: str) -> str:
        """Between whom the server is shared: `user` where there are several, else the address."""
        return user if len(self.users) > 1 else network(request.remote or "")

    def owner(self, user: str) -> str:
        """What names `user` in files that outlive this process.

        A user without a name is named by its place among the keys, which another key may have next
        time: so it is by the key itself, of which a digest tells nothing.
        """
        if not user.startswith(UNNAMED):
            return user
        digests = [digest.hex() for known, digest in self._digests if known == user]
        return f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()[:32]}"

    def cache_salt(self, user: str, asked: str) -> str:
        """What keeps `user`'s prompts apart in the prefix cache, with the salt asked for.

        A prompt that is found there is answered sooner, and `cached_tokens` tells how much of it
        was: whoever shares the cache can find out what the others have asked.
        """
        if len(self.users) < 2 or self._is_shared:
            return asked
        return f"{user}\0{asked}"

    def _user_of(self, key: str) -> str | None:
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that the time does not tell which one it was.
        users = [user for user, known in self._digests if hmac.compare_digest(digest, known)]
        return users[0] if users else None


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """An address as one client has it: of IPv6 everybody has 2^64 of their own."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""  # of a Unix socket
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
