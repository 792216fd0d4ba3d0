"""Adapters over HTTP: chosen by `model` on every endpoint, listed, loaded and unloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.engine.adapters import HostAdapters
from pyserve.errors import CheckpointError, ConfigError
from tests.api.fakes import MODEL, Server, run_server
from tests.waiting import wait_until

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
HELLO = [{"role": "user", "content": "hi"}]
# What each endpoint that generates is asked with.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 5},
}


def read(folder: Path) -> Any:
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}/adapter_config.json: No such file")
    return folder.name


def find(root: str) -> Path:
    if not Path(root).is_dir():
        raise ConfigError(f"{root} is neither a folder nor a name on the hub")
    return Path(root)


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Iterator[HostAdapters]:
    """Two adapters, "sql" and one whose name needs care."""
    adapters = HostAdapters(read, limit=4, find=find)
    for name in ("sql", 'a "b"\\c'):
        folder = tmp_path / f"of-{len(name)}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        adapters.load_at_start(name, str(folder))
    server.engine.adapters = adapters
    yield adapters
    server.engine.adapters = None


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_chooses_its_adapter(
    server: Server, store: HostAdapters, path: str, is_streamed: bool
) -> None:
    for name, expected in (("sql", "of-3"), ('a "b"\\c', "of-7"), (MODEL, None), ("", None)):
        server.play("Hello")
        body = {**BODIES[path], "model": name, "stream": is_streamed}
        status, _, reply = server.request("POST", path, body)
        assert status == 200
        shown = json.dumps(name or MODEL)
        assert f'"model":{shown}'.encode() in reply.replace(b": ", b":")
        (submitted,) = server.engine.submitted
        assert (submitted.adapter and submitted.adapter.weights) == expected
    wait_released(store)


def wait_released(store: HostAdapters) -> None:
    """What a handler does behind its answer."""
    wait_until(lambda: not store._num_holders)
    store.check_invariants()


def test_all_sequences_of_a_request_have_one_version(server: Server, store: HostAdapters) -> None:
    server.play("h" * 4)
    server.post("/v1/completions", {"model": "sql", "prompt": ["hi", "ho"], "n": 3})
    used = [submitted.adapter for submitted in server.engine.submitted]
    assert len(used) == 6 and len(set(used)) == 1 and used[0] is not None
    wait_released(store)


def test_names_that_are_not_served(server: Server, store: HostAdapters) -> None:
    for path, body in BODIES.items():
        status, _, reply = server.request("POST", path, {**body, "model": "code"})
        assert status == 404 and b"`code` does not exist" in reply
    assert server.post("/tokenize", {"prompt": "hi", "model": "sql"})["count"] > 0
    assert server.error("/tokenize", {"prompt": "hi", "model": "code"}, 404)["param"] == "model"


def test_the_list_of_models(server: Server, store: HostAdapters, tmp_path: Path) -> None:
    listed = json.loads(server.request("GET", "/v1/models")[2])["data"]
    shown = [(model["id"], model["root"], model["parent"]) for model in listed]
    assert shown == [
        (MODEL, MODEL, None), ("alias", MODEL, None),
        ("sql", str(tmp_path / "of-3"), MODEL), ('a "b"\\c', str(tmp_path / "of-7"), MODEL),
    ]  # fmt: skip
    one = json.loads(server.request("GET", "/v1/models/sql")[2])
    assert (one["id"], one["parent"]) == ("sql", MODEL)
    assert server.request("GET", "/v1/models/nobody")[0] == 404


def test_load_and_unload(server: Server, store: HostAdapters, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    body = {"lora_name": "code", "lora_path": str(folder)}
    status, headers, reply = server.request("POST", LOAD, {**body, "other": 1})
    assert status == 200 and reply == b"Success: LoRA adapter 'code' added successfully."
    assert headers["x-pyserve-ignored"] == "other"
    answer = server.post("/v1/completions", {"model": "code", "prompt": "hi"})
    assert answer["model"] == "code"
    error = server.error(LOAD, body)
    assert "already been loaded" in error["message"] and error["param"] == "lora_name"
    before = {it.version for it in store._kept.values()}
    assert server.request("POST", LOAD, {**body, "load_inplace": True})[0] == 200
    assert {it.version for it in store._kept.values()} != before
    status, _, reply = server.request("POST", UNLOAD, {"lora_name": "code", "lora_int_id": 3})
    assert status == 200 and reply == b"Success: LoRA adapter 'code' removed successfully."
    assert server.error(UNLOAD, {"lora_name": "code"}, 404)["param"] == "lora_name"
    assert server.request("POST", "/v1/completions", {"model": "code", "prompt": "hi"})[0] == 404


def test_loads_that_are_refused(
    server: Server, store: HostAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()

    def refusal(status: int = 400, **fields: Any) -> dict[str, Any]:
        body = {"lora_name": "x", "lora_path": str(tmp_path / "of-3"), **fields}
        return server.error(LOAD, body, status)

    assert refusal(lora_name=MODEL)["message"] == f"`{MODEL}` is the name of the base model"
    assert refusal(lora_name="alias")["param"] == "lora_name"
    assert refusal(lora_name="a\nb")["param"] == "lora_name"
    assert refusal(lora_name="")["param"] == "lora_name"
    for path in ("", "/nowhere", "x\0y", "org/name"):
        assert refusal(404, lora_path=path)["param"] == "lora_path"
    error = refusal(lora_path=str(tmp_path / "empty"))
    assert error["message"] == "`x`: adapter_config.json: No such file"
    monkeypatch.chdir(tmp_path / "empty")
    for path in (".", "./", "../empty", f"{tmp_path}/./empty//"):
        assert refusal(lora_path=path)["message"] == error["message"], path
    assert refusal(is_3d_lora_weight=True)["param"] == "is_3d_lora_weight"
    assert refusal(lora_path=None)["param"] == "lora_path"
    server.error(LOAD, {"lora_name": "x"})
    assert [adapter.name for adapter in store.served] == ["sql", 'a "b"\\c']


def test_an_adapter_of_the_hub_keeps_its_name(
    server: Server, store: HostAdapters, tmp_path: Path
) -> None:
    cached = {"org/sql": tmp_path / "of-3", "org/bad": tmp_path}
    store._find_folder = lambda root: cached.get(root) or find(root)
    body = {"lora_name": "hub", "lora_path": "org/sql"}
    assert server.request("POST", LOAD, body)[0] == 200
    listed = json.loads(server.request("GET", "/v1/models/hub")[2])
    assert listed["root"] == "org/sql"
    server.post("/v1/completions", {"model": "hub", "prompt": "hi"})
    used = server.engine.submitted[-1].adapter
    assert used is not None and used.weights == "of-3"
    error = server.error(LOAD, {"lora_name": "none", "lora_path": "org/none"}, 404)
    assert error["message"] == "No adapter found for `none` at 'org/none'."
    # Nor is it told where the cache lies.
    error = server.error(LOAD, {"lora_name": "bad", "lora_path": "org/bad"})
    assert error["message"] == "`bad`: adapter_config.json: No such file"


def test_a_server_without_adapters(server: Server) -> None:
    for path, body in ((LOAD, {"lora_name": "x", "lora_path": "/"}), (UNLOAD, {"lora_name": "x"})):
        assert "--enable-lora" in server.error(path, body, 404)["message"]
    assert server.error("/v1/completions", {"model": "x", "prompt": "hi"}, 404)["param"] == "model"


def test_they_are_behind_the_key(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, api_keys=("secret",)) as server:
        for path in (LOAD, UNLOAD):
            assert server.request("POST", path, {"lora_name": "x", "lora_path": "/"})[0] == 401


def test_a_foreign_page_may_not_ask(server: Server, store: HostAdapters) -> None:
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    status, _, reply = server.request("POST", UNLOAD, {"lora_name": "sql"}, headers)
    assert status == 400 and b"a page of another host" in reply
    assert store.has("sql")
