"""/v1/batches: files of requests that are answered in the background and give way to all others."""

from __future__ import annotations

import secrets
from operator import attrgetter

import msgspec
from aiohttp import web

from pyserve.api.batches.lines import BATCH_PATHS
from pyserve.api.batches.service import new_batch
from pyserve.api.endpoints.body import Wire, ignored_header
from pyserve.api.endpoints.files import service_of
from pyserve.api.endpoints.metadata import check_metadata
from pyserve.api.endpoints.query import part_of, read_query
from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE
from pyserve.api.wire.batches import BatchList, BatchRequest
from pyserve.api.wire.queries import ListQuery
from pyserve.errors import InvalidRequestError

WIRE = Wire(BatchRequest)


async def create_batch(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    body, ignored = await WIRE.read(request, request.app[STATE])
    if body.endpoint not in BATCH_PATHS:
        raise InvalidRequestError(
            f"endpoint must be one of {', '.join(BATCH_PATHS)}, got {body.endpoint[:100]}",
            "endpoint",
        )
    if body.completion_window != "24h":
        raise InvalidRequestError(
            f"completion_window must be 24h, got {body.completion_window[:50]}", "completion_window"
        )
    check_metadata(body.metadata or {})
    file = batches.store.file(owner, body.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"input_file_id must be a file of purpose batch, not {file.purpose}", "input_file_id"
        )
    batch = new_batch(
        f"batch_{secrets.token_hex(16)}",
        endpoint=body.endpoint,
        input_file_id=file.id,
        metadata=body.metadata,
    )
    await batches.create(owner, batch)
    return json_response(batch, ignored_header(ignored))


async def list_batches(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    query = read_query(request, ListQuery)
    listed = part_of(BatchList, batches.store.batches(owner), attrgetter("id"), query)
    return json_response(
        msgspec.structs.replace(listed, data=[batches.shown(batch) for batch in listed.data])
    )


async def retrieve_batch(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    batch = batches.store.batch(owner, request.match_info["batch_id"])
    return json_response(batches.shown(batch))


async def cancel_batch(request: web.Request) -> web.StreamResponse:
    batches, owner = service_of(request)
    return json_response(await batches.cancel(owner, request.match_info["batch_id"]))
