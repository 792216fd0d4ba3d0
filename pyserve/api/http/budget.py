"""ByteBudget: counts the bytes of memory that clients hold, in total and per client."""

from __future__ import annotations

from collections.abc import Callable


class ByteBudget:
    """Limits all clients together to `max_bytes`, and each of them to `max_client_bytes`.

    The caller decides what identifies a client, such as an address or a user.
    """

    def __init__(self, max_bytes: int, max_client_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_client_bytes = max_client_bytes
        self.num_bytes = 0
        self._by_client: dict[str, int] = {}

    def has_room(self, client: str, num_bytes: int) -> bool:
        """Whether `num_bytes` more for `client` stay within both limits."""
        return (
            self.num_bytes + num_bytes <= self.max_bytes
            and self._by_client.get(client, 0) + num_bytes <= self.max_client_bytes
        )

    def add(self, client: str, num_bytes: int) -> None:
        """Count `num_bytes` more for `client` without checking the limits; negative: fewer."""
        self.num_bytes += num_bytes
        held = self._by_client.get(client, 0) + num_bytes
        if held:
            self._by_client[client] = held
        else:
            self._by_client.pop(client, None)

    @property
    def largest_client(self) -> str | None:
        """The client that holds most bytes; None where none holds any."""
        held: Callable[[str], int] = self._by_client.__getitem__
        return max(self._by_client, key=held, default=None)
