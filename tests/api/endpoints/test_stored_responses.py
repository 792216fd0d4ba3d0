"""Responses that are come back to: the store, chains, references, and the background."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.store import background
from pyserve.api.store.responses import ResponseStore, StoredResponse
from pyserve.errors import EngineError, NotFoundError
from tests.api.fakes import Script, Server, run_server
from tests.api.response_talk import RESPONSES, parse, stream
from tests.api.tool_talk import OF_TOOLS, with_template
from tests.waiting import until, wait_until

BACKGROUND = {"background": True}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = with_template(tmp_path_factory.mktemp("stored") / "tiny", OF_TOOLS)
    with run_server(folder, enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        server.engine.info = replace(server.engine.info, max_model_len=4096)
        yield server


@pytest.fixture
def keyed(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder, api_keys=("alice=a", "alice=a2", "bob=b")) as server:
        server.play("Hello")
        yield server


def ask(**fields: Any) -> dict[str, Any]:
    return {"input": "hi", **fields}


def get(server: Server, path: str, status: int = 200, method: str = "GET") -> Any:
    got, _, reply = server.request(method, f"{RESPONSES}/{path}")
    assert got == status, reply
    return json.loads(reply)


def prompt_of(server: Server) -> str:
    return server.tokenizer.decode(server.engine.submitted[-1].prompt, skip_special_tokens=False)


def name_in(sock: socket.socket) -> str:
    """The id in the first event of a stream."""
    data = b""
    while b'"object"' not in data:
        data += sock.recv(4000)
    return data.decode().partition('"id":"')[2].partition('"')[0]


def said_by(response: Any) -> str:
    return str(response["output"][0]["content"][0]["text"])


def wait_ended(server: Server, name: str) -> Any:
    wait_until(lambda: get(server, name)["status"] not in ("queued", "in_progress"))
    return get(server, name)


def test_a_response_is_there_until_it_is_deleted(talking: Server) -> None:
    talking.play("Hello world")
    whole = talking.post(RESPONSES, ask())
    assert whole["store"] is True and get(talking, whole["id"]) == whole
    last = stream(talking, ask())[-1]["response"]
    assert get(talking, last["id"]) == last
    deleted = {"id": whole["id"], "object": "response", "deleted": True}
    assert get(talking, whole["id"], method="DELETE") == deleted
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel"),
    ):  # fmt: skip
        error = get(talking, whole["id"] + path, 404, method)["error"]
        assert error["message"] == f"Response with id '{whole['id']}' not found."
        assert error["param"] == "response_id"
    error = talking.error(RESPONSES, ask(previous_response_id=whole["id"]), 404)
    assert error["param"] == "previous_response_id"


def test_what_is_not_to_be_stored_is_not(talking: Server) -> None:
    talking.play("Hello")
    answer = talking.post(RESPONSES, ask(store=False))
    assert answer["store"] is False
    get(talking, answer["id"], 404)
    error = talking.error(RESPONSES, ask(store=False, background=True))
    assert error["param"] == "background"
    talking.play("Hello", eos=False, delay_s=0.01)
    num_stored = talking.state.responses.num_responses
    sock = talking.connect(RESPONSES, ask(stream=True))
    assert sock.recv(2000)
    sock.close()  # who goes away has no answer to come back to
    wait_until(lambda: not talking.engine.running())
    assert talking.state.responses.num_responses == num_stored


def test_a_server_that_stores_nothing(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, response_store_bytes=0) as server:
        server.play("Hello")
        status, headers, reply = server.request("POST", RESPONSES, ask(store=True))
        assert json.loads(reply)["store"] is False and headers["x-pyserve-ignored"] == "store"
        status, headers, reply = server.request("POST", RESPONSES, ask())
        assert "x-pyserve-ignored" not in headers
        get(server, json.loads(reply)["id"], 404)


def test_a_conversation_goes_on(talking: Server) -> None:
    talking.play('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    tools = [{"type": "function", "name": "now"}]
    first = talking.post(RESPONSES, ask(tools=tools, instructions="Be brief"))
    call = first["output"][0]
    talking.play("Noon")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "12:00"}
    second = talking.post(
        RESPONSES, ask(input=[result], tools=tools, previous_response_id=first["id"])
    )
    assert second["previous_response_id"] == first["id"]
    talking.post(RESPONSES, ask(input="And?", previous_response_id=second["id"]))
    assert prompt_of(talking) == (  # instructions are not carried over
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[{call['call_id']}]now{{}}"
        f"<|im_end|>\n<|im_start|>tool\n12:00({call['call_id']})<|im_end|>\n"
        "<|im_start|>assistant\nNoon<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    again = {"previous_response_id": second["id"]}
    assert talking.post(RESPONSES, again)["output"]  # nothing new is said
    get(talking, first["id"], method="DELETE")
    error = talking.error(RESPONSES, ask(**again), 404)
    assert error["message"] == f"Response with id '{first['id']}' not found."


def test_references_to_items(talking: Server) -> None:
    talking.play("Hello world")
    first = talking.post(RESPONSES, ask())
    asked = get(talking, f"{first['id']}/input_items")["data"][0]["id"]
    said = first["output"][0]["id"]
    body = [{"type": "item_reference", "id": asked}, {"id": said}, {"role": "user", "content": "x"}]
    again = talking.post(RESPONSES, ask(input=body))
    assert prompt_of(talking) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello world<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = [item["id"] for item in get(talking, f"{again['id']}/input_items?order=asc")["data"]]
    assert ids[:2] == [asked, said] and len(set(ids)) == 3
    for name in ("msg_1", said[:-1] + "9", "x" * 999):
        error = talking.error(RESPONSES, ask(input=[body[0], {"id": name}]), 404)
        assert error["param"] == "input[1].id"
        assert error["message"] == f"Item with id '{name[:80]}' not found."


def test_input_items_come_in_parts(talking: Server) -> None:
    talking.play("Hello")
    items = [{"role": "user", "content": str(i), "id": f"mine_{i}"} for i in range(25)]
    name = talking.post(RESPONSES, ask(input=items))["id"]
    found: list[str] = []
    after = ""
    while True:
        listed = get(talking, f"{name}/input_items?limit=10{after}")
        ids = [item["id"] for item in listed["data"]]
        assert (listed["first_id"], listed["last_id"]) == (ids[0], ids[-1])
        found += ids
        after = f"&after={ids[-1]}"
        if not listed["has_more"]:
            break
    assert found == [f"mine_{i}" for i in range(24, -1, -1)]
    assert len(get(talking, f"{name}/input_items?order=asc")["data"]) == 20
    for query, param in (
        ("limit=0", "limit"), ("limit=101", "limit"), ("limit=--1", "limit"), ("limit=x", "limit"),
        ("order=up", "order"), ("after=nothing", "after"),
    ):  # fmt: skip
        assert get(talking, f"{name}/input_items?{query}", 400)["error"]["param"] == param


def test_input_tokens(talking: Server) -> None:
    talking.play("Hello")
    body = ask(instructions="Be brief", tools=[{"type": "function", "name": "now"}])
    counted = talking.post(f"{RESPONSES}/input_tokens", body)
    usage = talking.post(RESPONSES, body)["usage"]
    assert counted == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}
    error = talking.error(f"{RESPONSES}/input_tokens", ask(input=[{"type": 1}]))
    assert error["param"] == "input[0].type"
    status, headers, _ = talking.request("POST", f"{RESPONSES}/input_tokens", ask(mood=1))
    assert (status, headers["x-pyserve-ignored"]) == (200, "mood")


def test_another_key_s_response_is_not_there(keyed: Server) -> None:
    def send(key: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        status, _, reply = keyed.request(method, RESPONSES + path, body, headers)
        return status, json.loads(reply)

    _, first = send("a", "POST", "", ask())
    _, run = send("a", "POST", "", ask(background=True))
    for response in (first, run):
        path = f"/{response['id']}"
        for key, expected in (("a", 200), ("a2", 200), ("b", 404)):  # alice has two keys
            assert send(key, "GET", path)[0] == expected
            assert send(key, "GET", f"{path}/input_items")[0] in (expected, 404)
        item = response["output"][0]["id"] if response["output"] else f"msg_{path[6:]}8000"
        for body in (ask(previous_response_id=response["id"]), ask(input=[{"id": item}])):
            assert send("b", "POST", "", body)[0] == 404
        assert send("b", "POST", f"{path}/cancel")[0] == 404
        assert send("b", "DELETE", path)[0] == 404
        wait_until(lambda: not keyed.engine.running() and not keyed.state.runs)
        assert send("a", "DELETE", path)[0] == 200


def test_a_response_in_the_background(talking: Server) -> None:
    talking.play("Hello", eos=False, delay_s=0.05)
    endless = talking.post(RESPONSES, ask(**BACKGROUND))["id"]
    assert get(talking, endless)["status"] in ("queued", "in_progress")
    (item,) = get(talking, f"{endless}/input_items")["data"]
    assert (item["role"], item["content"][0]["text"]) == ("user", "hi")
    error = talking.error(RESPONSES, ask(previous_response_id=endless))
    assert "has not ended" in error["message"] and error["param"] == "previous_response_id"
    metrics = talking.request("GET", "/metrics")[2].decode()
    assert 'pyserve:background_responses{engine="0",model_name="org/tiny"} 1.0' in metrics
    get(talking, endless, method="DELETE")
    talking.play("Hello world")
    queued = talking.post(RESPONSES, ask(**BACKGROUND))
    assert (queued["status"], queued["output"], queued["background"]) == ("queued", [], True)
    done = wait_ended(talking, queued["id"])
    assert (
        done["status"] == "completed" and done["output"][0]["content"][0]["text"] == "Hello world"
    )
    assert set(done) == set(queued) and len(talking.state.runs) == 0
    assert get(talking, f"{done['id']}/cancel", method="POST") == done  # it has ended
    talking.play("Hello")
    whole = talking.post(RESPONSES, ask())
    error = get(talking, f"{whole['id']}/cancel", 400, "POST")["error"]
    assert error["message"] == "Cannot cancel a synchronous response."
    error = get(talking, f"{done['id']}?stream=true", 400)["error"]
    assert error["param"] == "stream"


def has_said(server: Server, num_tokens: int) -> bool:
    """Whether the engine has so many tokens of the only sequence."""
    submitted = server.engine.submitted
    return bool(submitted) and submitted[0].num_tokens >= num_tokens


def test_cancel_and_delete_stop_a_run(talking: Server) -> None:
    for streamed in (False, True):
        hello = talking.play("Hello", eos=False, delay_s=0.002)
        body = ask(**BACKGROUND, max_output_tokens=4000)
        if streamed:
            sock = talking.connect(RESPONSES, {**body, "stream": True})
            name = name_in(sock)
        else:
            name = talking.post(RESPONSES, body)["id"]
        wait_until(partial(has_said, talking, 3 * len(hello)))
        cancelled = get(talking, f"{name}/cancel", method="POST")
        assert cancelled["status"] == "cancelled" and talking.engine.submitted[0].is_aborted
        assert said_by(cancelled).startswith("Hello")
        assert cancelled["output"][0]["status"] == "incomplete"
        assert cancelled["usage"]["output_tokens"] > 1
        assert get(talking, name) == cancelled and len(talking.state.runs) == 0
        if streamed:
            sock.settimeout(5)
            data = b""
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data += sock.recv(2**16)
            sock.close()
        talking.play("Hello", eos=False, delay_s=0.002)
        name = talking.post(RESPONSES, body)["id"]
        get(talking, name, method="DELETE")
        get(talking, name, 404)
        assert not talking.engine.running() and len(talking.state.runs) == 0


def test_a_run_that_fails(talking: Server) -> None:
    for streamed in (False, True):
        talking.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
        if streamed:
            name = stream(talking, ask(**BACKGROUND))[0]["response"]["id"]
        else:
            name = talking.post(RESPONSES, ask(**BACKGROUND))["id"]
        failed = wait_ended(talking, name)
        assert failed["status"] == "failed"
        assert failed["error"] == {"code": "server_error", "message": "a step failed"}


def test_a_stream_is_read_again(talking: Server) -> None:
    talking.play("Hello world, how are you?", delay_s=0.002)
    events = stream(talking, ask(**BACKGROUND))
    name = events[0]["response"]["id"]
    assert events[-1]["response"] == get(talking, name)
    for after in (-1, 0, 3, len(events) - 1, 10**6):
        _, _, reply = talking.request(
            "GET", f"{RESPONSES}/{name}?stream=true&starting_after={after}"
        )
        again = [
            json.loads(frame.split("\ndata: ")[1]) for frame in reply.decode().split("\n\n")[:-1]
        ]
        assert again == events[after + 1 :]
    error = get(talking, f"{name}?stream=true&starting_after=x", 400)["error"]
    assert error["param"] == "starting_after"


def test_a_stream_is_read_while_it_runs_and_its_client_has_gone(talking: Server) -> None:
    talking.play("Hello world, how are you?", delay_s=0.02)
    sock = talking.connect(RESPONSES, ask(**BACKGROUND, stream=True))
    name = name_in(sock)
    sock.close()
    _, _, reply = talking.request("GET", f"{RESPONSES}/{name}?stream=true")
    events = parse(reply)
    assert events[-1]["type"] == "response.completed" and not talking.engine.submitted[0].is_aborted
    assert events[-1]["response"] == get(talking, name)
    text = said_by(events[-1]["response"])
    assert text == "Hello world, how are you?"
    assert "".join(event.get("delta", "") for event in events) == text


def test_runs_are_bounded(talking: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MAX_CLIENT_RUNS", 2)
    talking.play("Hello", eos=False, delay_s=0.01)
    names = [talking.post(RESPONSES, ask(**BACKGROUND))["id"] for _ in range(2)]
    status, headers, reply = talking.request("POST", RESPONSES, ask(**BACKGROUND))
    assert status == 429 and headers["Retry-After"] == "5"
    assert "the limits are 1024 and 2" in json.loads(reply)["error"]["message"]
    for name in names:
        get(talking, f"{name}/cancel", method="POST")
    talking.play("Hello")
    assert wait_ended(talking, talking.post(RESPONSES, ask(**BACKGROUND))["id"])["output"]
    talking.engine.room = 0
    try:
        status, headers, _ = talking.request("POST", RESPONSES, ask(**BACKGROUND))
        assert (status, headers["Retry-After"]) == (429, "7") and len(talking.state.runs) == 0
    finally:
        talking.engine.room = None


def test_events_of_runs_are_bounded(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, response_store_bytes=20_000) as server:
        server.play("Hello", eos=False)
        events = stream(server, ask(**BACKGROUND))
        assert events[-2]["type"] == "response.failed"
        assert "the events of responses in the background take" in events[-1]["message"]
        assert len(server.state.runs) == 0 and not server.engine.running()
        server.play("Hello")
        assert server.post(RESPONSES, ask())["status"] == "completed"


def test_created_and_never_fetched(tokenizer_folder: Path) -> None:
    """Memory is bounded and nothing runs on, whatever clients leave behind."""
    with run_server(tokenizer_folder, response_store_bytes=60_000) as server:
        server.play("Hello")
        for i in range(60):
            server.post(RESPONSES, ask(background=i % 2 == 0))
        wait_until(lambda: not server.state.runs)
        store = server.state.responses
        assert 10 < store.num_responses < 60 and store.num_bytes <= 60_000
        server.play("Hello", eos=False, delay_s=0.01)
        for _ in range(20):
            server.connect(RESPONSES, ask(stream=True)).close()
        wait_until(lambda: not server.engine.running())
        metrics = server.request("GET", "/metrics")[2].decode()
        line = next(
            x for x in metrics.splitlines() if x.startswith("pyserve:stored_response_bytes{")
        )
        assert float(line.split()[-1]) == store.num_bytes


def make(name: str, size: int = 0, previous: str | None = None) -> StoredResponse:
    return StoredResponse(name, previous, b"x" * size, b"[]")


def test_the_store_is_bounded_in_bytes() -> None:
    async def run() -> None:
        store = ResponseStore(10 * make("a", 1000).num_bytes, 60.0)
        for i in range(8):
            store.put("alice", make(f"a{i}", 1000))
        for i in range(5):
            store.put("bob", make(f"b{i}", 1000))
        # Who holds most has lost their oldest.
        assert [name for name in (f"a{i}" for i in range(8)) if has(store, "alice", name)] == [
            "a3", "a4", "a5", "a6", "a7"
        ]  # fmt: skip
        assert all(has(store, "bob", f"b{i}") for i in range(5))
        store.get("alice", "a3")  # is used, so that another is the oldest
        store.put("alice", make("a8", 1000))
        assert has(store, "alice", "a3") and not has(store, "alice", "a4")
        store.put("bob", make("large", 10**6))
        assert not has(store, "bob", "large") and store.num_responses == 10
        store.close()
        assert store.num_bytes == store.num_responses == 0

    asyncio.run(run())


def test_the_store_forgets_what_is_old() -> None:
    async def run() -> None:
        store = ResponseStore(10**6, 0.1)
        began_s = time.monotonic()
        store.put("alice", make("a"))
        store.put("bob", make("b"))
        await until(lambda: not store.num_responses)  # nobody asks for anything
        assert time.monotonic() - began_s >= 0.1 and store.num_bytes == 0
        store = ResponseStore(10**6, 3600.0)
        response = make("a")
        store.put("alice", response)
        used_s = response.used_s
        await asyncio.sleep(0.01)
        assert store.get("alice", "a").used_s > used_s  # which makes it young again
        store.close()

    asyncio.run(run())


def test_a_chain_is_bounded() -> None:
    async def run() -> None:
        store = ResponseStore(10**8, 60.0)
        for i in range(1026):
            store.put("alice", make(str(i), previous=str(i - 1) if i else None))
        assert [one.id for one in store.chain("alice", "1023")] == [str(i) for i in range(1024)]
        with pytest.raises(Exception, match="more than 1024 responses"):
            store.chain("alice", "1024")
        with pytest.raises(NotFoundError):
            store.chain("bob", "3")
        store.close()

    asyncio.run(run())


def has(store: ResponseStore, user: str, name: str) -> bool:
    try:
        return store.get(user, name).id == name
    except NotFoundError:
        return False
