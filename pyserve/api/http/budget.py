"""How many bytes of the server's memory clients hold: all together, and each."""

from __future__ import annotations

from collections.abc import Callable


class ByteBudget:
    """`max_bytes` for all clients, of which one may have `max_client_bytes`.

    The caller decides what a client is: an address, or an API key at an address.
    """

    def __init__(self, max_bytes: int, max_client_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_client_bytes = max_client_bytes
        self.num_bytes = 0
        self._by_client: dict[str, int] = {}

    def has_room(self, client: str, num_bytes: int) -> bool:
        """Whether `client` may have `num_bytes` more."""
        return (
            self.num_bytes + num_bytes <= self.max_bytes
            and self._by_client.get(client, 0) + num_bytes <= self.max_client_bytes
        )

    def add(self, client: str, num_bytes: int) -> None:
        """Count `num_bytes` more, or less where negative, whether there is room or not."""
        self.num_bytes += num_bytes
        held = self._by_client.get(client, 0) + num_bytes
        if held:
            self._by_client[client] = held
        else:
            self._by_client.pop(client, None)

    @property
    def largest_client(self) -> str | None:
        """Who holds most; None where nobody holds anything."""
        held: Callable[[str], int] = self._by_client.__getitem__
        return max(self._by_client, key=held, default=None)
