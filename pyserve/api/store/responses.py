"""ResponseStore: ended responses of the Responses API, in memory, limited in bytes and in age.

    user -> id -> response, the least recently used first

A response is kept as JSON, so that its size is known. It holds its own input and output, and the id
of the response before it, so a conversation is a chain of responses. The server makes the id of a
response when its generation begins, and the response before it must exist by then; so chains have
no cycles.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyserve.errors import InvalidRequestError, NotFoundError

MAX_CHAIN = 1024  # maximum number of responses in one conversation
MORE_BYTES = 1024  # memory that a response takes beside its JSON


@dataclass(slots=True, eq=False)
class StoredResponse:
    """A response that has ended.

    previous_id  id of the response before it in the conversation; None: it is the first.
    answer       the response object as it was sent, as JSON.
    input        its own input items as a JSON list, without those of the responses before it.
    events       events of its stream, where that may be read again.
    used_s       when it was last used, on the event loop's clock, in s.
    num_bytes    memory that it takes.
    """

    id: str
    previous_id: str | None
    answer: bytes
    input: bytes
    events: Sequence[bytes] = ()
    used_s: float = 0.0
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = len(self.answer) + len(self.input) + MORE_BYTES
        self.num_bytes += sum(map(len, self.events))


@dataclass(slots=True)
class _Kept:
    """The responses of one user, the least recently used first, and the bytes that they take."""

    responses: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    num_bytes: int = 0


class ResponseStore:
    """The stored responses of one server. All methods run on the event loop.

    max_bytes  limit on all of them together; 0: none is stored. When it is exceeded, the user who
               holds most bytes loses the least recently used response.
    max_age_s  a response that was not used for so long is dropped.
    """

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._users: dict[str, _Kept] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        return self._max_bytes > 0

    @property
    def num_responses(self) -> int:
        return sum(len(kept.responses) for kept in self._users.values())

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._users.values())

    def put(self, user: str, response: StoredResponse) -> None:
        """Store `response`, unless it alone exceeds the limit."""
        if response.num_bytes > self._max_bytes:
            return
        kept = self._users.setdefault(user, _Kept())
        kept.responses[response.id] = response
        kept.num_bytes += response.num_bytes
        self._touch(kept, response)
        while self.num_bytes > self._max_bytes:
            largest = max(self._users, key=lambda name: self._users[name].num_bytes)
            self._remove(largest, next(iter(self._users[largest].responses)))
        self._arm()

    def get(self, user: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """`user`'s response with this id. Raises NotFoundError, also where it is another user's."""
        kept = self._users.get(user)
        response = None if kept is None else kept.responses.get(response_id)
        if kept is None or response is None:
            raise not_found(response_id, param)
        self._touch(kept, response)
        return response

    def chain(self, user: str, response_id: str) -> list[StoredResponse]:
        """The conversation that ends with the response `response_id`, its first response first.

        Raises NotFoundError where one of its responses is not stored, InvalidRequestError where
        there are more than MAX_CHAIN; both name previous_response_id.
        """
        param = "previous_response_id"
        found: list[StoredResponse] = []
        next_id: str | None = response_id
        while next_id is not None:
            if len(found) == MAX_CHAIN:
                raise InvalidRequestError(
                    f"{param}: the conversation has more than {MAX_CHAIN} responses", param
                )
            found.append(self.get(user, next_id, param))
            next_id = found[-1].previous_id
        return found[::-1]

    def delete(self, user: str, response_id: str) -> None:
        """Delete a response. Raises NotFoundError."""
        self.get(user, response_id)
        self._remove(user, response_id)

    def close(self) -> None:
        """Drop all responses."""
        self._users.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _touch(self, kept: _Kept, response: StoredResponse) -> None:
        response.used_s = asyncio.get_running_loop().time()
        kept.responses.move_to_end(response.id)

    def _remove(self, user: str, response_id: str) -> None:
        kept = self._users[user]
        kept.num_bytes -= kept.responses.pop(response_id).num_bytes
        if not kept.responses:
            del self._users[user]

    def _oldest(self) -> list[tuple[str, StoredResponse]]:
        """The least recently used response of each user."""
        return [(user, next(iter(kept.responses.values()))) for user, kept in self._users.items()]

    def _arm(self) -> None:
        """Set the timer for when the next response is too old, even if no request comes by then."""
        if self._timer is None and self._users:
            next_s = min(response.used_s for _, response in self._oldest()) + self._max_age_s
            self._timer = asyncio.get_running_loop().call_at(next_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        limit_s = asyncio.get_running_loop().time() - self._max_age_s
        while old := [user_and for user_and in self._oldest() if user_and[1].used_s <= limit_s]:
            for user, response in old:
                self._remove(user, response.id)
        self._arm()


def not_found(response_id: str, param: str) -> NotFoundError:
    """The error for an unknown response id, in OpenAI's wording."""
    return NotFoundError(f"Response with id '{response_id[:80]}' not found.", param)
