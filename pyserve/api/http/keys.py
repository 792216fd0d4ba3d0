"""API keys: which user sends a request, and which client its use of the server counts for.

A user is a name with one or more keys, or a single key without a name (config.py). Limits and
fairness apply per client: per user where there are several, else per network address. All that
comes through a proxy counts as one address, because headers that name the real one can be forged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from aiohttp import web

from pyserve.config import UNNAMED

USER = web.RequestKey("user", str)  # user of a request that has passed the check of its key
CLIENT = web.RequestKey("client", str)  # client that limits and fairness count the request for
IS_BACKGROUND = web.RequestKey("is_background", bool)  # requests that are not go first


class Keys:
    """The API keys and their users. Keys are compared in constant time.

    keys        (user, key) pairs; empty: no key is needed.
    is_shared   users share the prefix cache, instead of each having their own part of it.
    users       the distinct users, in the order of their keys.
    """

    def __init__(self, keys: Sequence[tuple[str, str]], *, is_shared: bool = False) -> None:
        self._digests = [(user, hashlib.sha256(key.encode()).digest()) for user, key in keys]
        self._is_shared = is_shared
        self.users = tuple(dict.fromkeys(user for user, _ in keys))

    def user(self, request: web.Request) -> str | None:
        """The user of a request; "" where no key is needed, None where the key is wrong or missing.

        The key is a Bearer token, as OpenAI's clients send it, or in x-api-key, as Anthropic's do.
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
        """The client of a request: `user` where there are several users, else the address."""
        return user if len(self.users) > 1 else network(request.remote or "")

    def owner(self, user: str) -> str:
        """A name for `user` in files that outlive this process.

        A user without a name is called by the position of its key, which may belong to another key
        after a restart. So such a user gets a digest of the key, which does not reveal the key.
        """
        if not user.startswith(UNNAMED):
            return user
        digests = [digest.hex() for known, digest in self._digests if known == user]
        return f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()[:32]}"

    def cache_salt(self, user: str, asked: str) -> str:
        """The prefix-cache salt of a request: `asked`, the client's own, combined with `user`.

        A cached prompt is answered faster, and `cached_tokens` says how much of it was cached. So
        users who share the cache could find out each other's prompts, unless salts separate them.
        """
        if len(self.users) < 2 or self._is_shared:
            return asked
        return f"{user}\0{asked}"

    def _user_of(self, key: str) -> str | None:
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All keys are compared, so that the time taken does not reveal which one matched.
        users = [user for user, known in self._digests if hmac.compare_digest(digest, known)]
        return users[0] if users else None


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """The network of `address` that counts as one client: IPv4 alone, of IPv6 the /64 prefix.

    An IPv6 client has 2^64 addresses to choose from. Returns "" for what is not an address.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""  # a Unix socket has no address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
