"""GET /v1/models and /v1/models/{id}: one entry per served name, adapters last."""

from __future__ import annotations

import hashlib

import msgspec
from aiohttp import web

from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE, ServerState
from pyserve.client import ServedAdapter


class Permission(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "pyserve"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[Permission]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


async def list_models(request: web.Request) -> web.StreamResponse:
    """List every name under which the base model or an adapter is served."""
    state = request.app[STATE]
    max_model_len = state.model().engine.info.max_model_len
    entries = [_entry(state, name, max_model_len) for name in state.config.served_model_names]
    entries += [_entry(state, adapter.name, max_model_len, adapter) for adapter in _adapters(state)]
    return json_response(ModelList(data=entries))


async def retrieve_model(request: web.Request) -> web.StreamResponse:
    """The entry of one served name. Raises NotFoundError for any other name."""
    state = request.app[STATE]
    max_model_len = state.model().engine.info.max_model_len
    name = request.match_info["model"]
    name = name.removesuffix("/") or name
    adapter = next((it for it in _adapters(state) if it.name == name), None)
    if adapter is None:
        state.check_model_name(name)
    return json_response(_entry(state, name, max_model_len, adapter))


def _adapters(state: ServerState) -> list[ServedAdapter]:
    adapters = state.model().engine.adapters
    return [] if adapters is None else adapters.served


def _entry(
    state: ServerState, name: str, max_model_len: int, adapter: ServedAdapter | None = None
) -> Model:
    permission_id = hashlib.sha256(name.encode()).hexdigest()[:32]
    return Model(
        id=name,
        created=state.created,
        root=state.model_name if adapter is None else adapter.root,
        parent=None if adapter is None else state.model_name,
        max_model_len=max_model_len,
        permission=[Permission(id=f"modelperm-{permission_id}", created=state.created)],
    )
