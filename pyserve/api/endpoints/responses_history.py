"""Stored context of a Responses request: the earlier responses, and items referred to by id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pyserve import any_json
from pyserve.api.store.responses import ResponseStore, StoredResponse
from pyserve.api.wire.responses import Object, ResponsesRequest
from pyserve.errors import InvalidRequestError, NotFoundError

ID_PREFIX = "resp_"
PREFIXES = {
    "message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc",
    "function_call_output": "fco", "custom_tool_call_output": "ctco",
}  # fmt: skip
# Item ids end in the item's place as four hex digits: output items count from 0, input items from
# here, so that the two never collide.
FIRST_INPUT = 0x8000
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})[0-9a-f]{4}")


def item_id(kind: object, response_id: str, place: int) -> str:
    """The id of an item of a response. It contains the response's id, so `gather` can find it.

    kind   the item's type, such as "message".
    place  0 and up for output items, FIRST_INPUT and up for input items.
    """
    prefix = PREFIXES.get(kind, "item") if isinstance(kind, str) else "msg"
    return f"{prefix}_{response_id.removeprefix(ID_PREFIX)}{place:04x}"


class _Answer(msgspec.Struct, frozen=True):
    output: list[Any]


@dataclass(frozen=True, slots=True)
class History:
    """The stored responses that a request builds on.

    chain     the conversation up to previous_response_id, the oldest response first.
    referred  id of an item that the input refers to -> the stored response that contains it.
    """

    chain: Sequence[StoredResponse] = ()
    referred: dict[str, StoredResponse] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of JSON of these responses, each counted once."""
        stored = {response.id: response for response in (*self.chain, *self.referred.values())}
        return sum(len(response.answer) + len(response.input) for response in stored.values())

    def items(self) -> list[Object]:
        """The input and output items of the earlier responses, in order."""
        return [item for response in self.chain for item in _items_of(response)]

    def resolve(self, items: Sequence[Object]) -> list[Object]:
        """`items` with each reference replaced by the stored item that it names.

        Raises NotFoundError naming the field if the stored response has no such item.
        """
        known: dict[str, dict[str, Object]] = {}
        found = []
        for i, item in enumerate(items):
            name = reference_of(item)
            if name is not None:
                response = self.referred[name]
                if response.id not in known:
                    known[response.id] = {one["id"]: one for one in _items_of(response)}
                if name not in known[response.id]:
                    raise _no_item(name, i)
                item = known[response.id][name]
            found.append(item)
        return found


def gather(
    store: ResponseStore,
    user: str,
    body: ResponsesRequest,
    items: Sequence[Object],
    *,
    max_bytes: int,
) -> History:
    """Look up the stored responses that `body` builds on; their JSON is decoded later.

    items      the request's own items, with references.
    max_bytes  the limit on the JSON of all these responses together.

    Raises NotFoundError for an unknown response or item, InvalidRequestError for too many bytes or
    too long a chain; both name the field.
    """
    chain: Sequence[StoredResponse] = ()
    if body.previous_response_id is not None:
        chain = store.chain(user, body.previous_response_id)
    referred = {}
    for i, item in enumerate(items):
        name = reference_of(item)
        if name is not None and name not in referred:
            match = _ITEM_ID.fullmatch(name)
            try:
                referred[name] = store.get(user, ID_PREFIX + match[1] if match else name)
            except NotFoundError:
                raise _no_item(name, i) from None
    history = History(chain, referred)
    if history.num_bytes > max_bytes:
        param = "previous_response_id" if chain else "input"
        raise InvalidRequestError(
            f"{param}: the responses before this one have {history.num_bytes} bytes, the limit is "
            f"{max_bytes}",
            param,
        )
    return history


def reference_of(item: Object) -> str | None:
    """The id of the item that `item` refers to; None if `item` is no reference.

    A reference may leave out its type; a message without a type is told from it by its role.
    """
    kind, name = item.get("type"), item.get("id")
    if kind not in (None, "item_reference") or "role" in item or not isinstance(name, str):
        return None
    return name


def identified(items: Sequence[Object], response_id: str) -> list[Object]:
    """The input items of a response as they are stored, with a `type` and an `id` in each."""
    found = []
    for i, item in enumerate(items):
        kind = item.get("type") or "message"
        name = item.get("id")
        if not isinstance(name, str) or not name:
            name = item_id(kind, response_id, FIRST_INPUT + i)
        found.append({**item, "type": kind, "id": name})
    return found


def _items_of(response: StoredResponse) -> list[Object]:
    """The input items of a stored response, followed by its output items."""
    own: list[Object] = any_json.decode(response.input)
    return own + msgspec.json.decode(response.answer, type=_Answer).output


def _no_item(name: str, place: int) -> NotFoundError:
    return NotFoundError(f"Item with id '{name[:80]}' not found.", f"input[{place}].id")
