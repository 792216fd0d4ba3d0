"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: add and remove LoRA adapters by name."""

from __future__ import annotations

from aiohttp import web

from pyserve.api.endpoints.body import Wire, ignored_header
from pyserve.api.http.cors import is_foreign_page
from pyserve.api.state import STATE, ServerState
from pyserve.api.wire.adapters import LoadAdapterRequest, UnloadAdapterRequest
from pyserve.client import AdapterStore
from pyserve.errors import CheckpointError, InvalidRequestError, NotFoundError, StartupError
from pyserve.log import get_logger

LOAD, UNLOAD = Wire(LoadAdapterRequest), Wire(UnloadAdapterRequest)


async def load_adapter(request: web.Request) -> web.StreamResponse:
    """Load an adapter from a folder or from the hub and serve it under a name.

    With load_inplace it replaces the adapter that the name stands for.
    """
    state = request.app[STATE]
    adapters = _adapters(request, state)
    body, ignored = await LOAD.read(request, state)
    name, path = body.lora_name, body.lora_path
    if name in state.config.served_model_names:
        raise InvalidRequestError(f"`{name[:200]}` is the name of the base model", "lora_name")
    if body.is_3d_lora_weight:
        raise InvalidRequestError(
            "is_3d_lora_weight is of experts, whose adapters are not supported", "is_3d_lora_weight"
        )
    missing = f"No adapter found for `{name[:200]}` at {path[:200]!r}."
    if not path or "\0" in path:
        raise NotFoundError(missing, "lora_path")
    try:
        await adapters.load(name, path, is_reload=bool(body.load_inplace))
    except CheckpointError as error:
        raise InvalidRequestError(f"`{name[:200]}`: {error}", "lora_path") from error
    except StartupError as error:  # neither a folder nor a repository of the hub has this name
        get_logger().error("adapter %s: %s", name, error)
        raise NotFoundError(missing, "lora_path") from error
    get_logger().info("adapter %s: %s", name, path)
    return _success(f"LoRA adapter '{name}' added successfully.", ignored)


async def unload_adapter(request: web.Request) -> web.StreamResponse:
    """Stop serving a name; running requests that use its adapter finish with it."""
    state = request.app[STATE]
    adapters = _adapters(request, state)
    body, ignored = await UNLOAD.read(request, state)
    adapters.unload(body.lora_name)
    get_logger().info("adapter %s is not served any more", body.lora_name)
    return _success(f"LoRA adapter '{body.lora_name}' removed successfully.", ignored)


def _adapters(request: web.Request, state: ServerState) -> AdapterStore:
    if is_foreign_page(request):
        raise InvalidRequestError(f"a page of another host may not ask for {request.path}")
    adapters = state.model().engine.adapters
    if adapters is None:
        raise NotFoundError("this server has no adapters: it was started without --enable-lora")
    return adapters


def _success(text: str, ignored: list[str]) -> web.Response:
    return web.Response(text=f"Success: {text}", headers=ignored_header(ignored))
