"""Query parameters, with OpenAI's and vLLM's names. Their descriptions are for /openapi.json."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class ListQuery(msgspec.Struct, frozen=True, kw_only=True):
    after: Annotated[
        str | None, Meta(description="The id of an entry: the list starts behind it.")
    ] = None
    limit: Annotated[int, Meta(ge=1, le=10_000, description="Return at most so many entries.")] = (
        100
    )
    order: Annotated[
        Literal["asc", "desc"], Meta(description="desc lists the newest entry first, asc last.")
    ] = "desc"


class FileListQuery(ListQuery, frozen=True, kw_only=True):
    purpose: Annotated[str | None, Meta(description="List only the files with this purpose.")] = (
        None
    )


class InputItemsQuery(ListQuery, frozen=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=100, description="Return at most so many items.")] = 20


class ResponseQuery(msgspec.Struct, frozen=True, kw_only=True):
    stream: Annotated[
        bool,
        Meta(
            description="Return the events of the response as server-sent events. The response "
            "must have been created with background: true and stream: true."
        ),
    ] = False
    starting_after: Annotated[
        Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None,
        Meta(description="With stream=true: leave out the events up to this sequence_number."),
    ] = None


class SleepQuery(msgspec.Struct, frozen=True, kw_only=True):
    level: Annotated[
        Literal[1, 2],
        Meta(description="1 frees the memory of the KV cache, 2 that of the weights as well."),
    ] = 1
    mode: Annotated[
        Literal["keep", "abort"],
        Meta(
            description="keep: running requests go on after /wake_up. abort: they end in an error."
        ),
    ] = "keep"


class WakeUpQuery(msgspec.Struct, frozen=True, kw_only=True):
    tags: Annotated[
        list[Literal["weights", "kv_cache"]],
        Meta(description="Both values, or none: waking up only one of them is not supported."),
    ] = []
