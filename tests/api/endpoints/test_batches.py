"""Files and batches over HTTP: with OpenAI's SDK, between keys, across restarts, hostile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection as Connection
from pathlib import Path
from typing import Any

import openai
import pytest

from pyserve.api.batches import service
from pyserve.api.batches import store as stores
from pyserve.api.batches.journal import Journal, JournalError
from pyserve.errors import StartupError
from tests.api.fakes import Script, Server, run_server
from tests.api.test_serve import START_S, Process, start
from tests.waiting import wait_until

KEYS = ("alice=secret-a", "bob=secret-b")
ALICE = {"Authorization": "Bearer secret-a"}
BOB = {"Authorization": "Bearer secret-b"}
LAST = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def batching(tokenizer_folder: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(tokenizer_folder, tmp_path) as server:
        yield server


def serving(folder: Path, tmp_path: Path, **config: Any) -> Any:
    options = {"batch_max_file_bytes": 100_000, "batch_max_total_bytes": 400_000, **config}
    return run_server(folder, api_keys=KEYS, batch_dir=tmp_path / "batches", **options)


def sdk(server: Server, key: str = "secret-a") -> openai.OpenAI:
    url = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20)


def lines(count: int, **body: Any) -> bytes:
    requests = [
        {"custom_id": f"r-{n}", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": [80], "max_tokens": 2, **body}}
        for n in range(count)
    ]  # fmt: skip
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def upload(server: Server, content: bytes, headers: dict[str, str] = ALICE, **fields: str) -> Any:
    """Status and body of an upload by hand; `fields` change those of the form."""
    form = {"purpose": "batch", **fields}
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in form.items()
    ]
    head = '--B\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    body = b"".join([*parts, head.encode(), content, b"\r\n--B--\r\n"])
    return send(server, body, headers)


def send(server: Server, body: bytes, headers: dict[str, str] = ALICE) -> Any:
    sent = {**headers, "Content-Type": "multipart/form-data; boundary=B"}
    status, _, reply = server.request("POST", "/v1/files", body, sent)
    return status, json.loads(reply)


def ask(server: Server, method: str, path: str, body: Any = None, who: Any = ALICE) -> Any:
    status, _, reply = server.request(method, path, body, who)
    return status, json.loads(reply)


def content_of(server: Server, id: str) -> bytes:
    status, _, content = server.request("GET", f"/v1/files/{id}/content", None, ALICE)
    assert status == 200
    return content


def begin(server: Server, content: bytes, endpoint: str = "/v1/completions") -> str:
    status, file = upload(server, content)
    assert status == 200, file
    body = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"}
    status, batch = ask(server, "POST", "/v1/batches", body)
    assert status == 200, batch
    return str(batch["id"])


def ended(server: Server, id: str) -> Any:
    def batch() -> Any:
        _, batch = ask(server, "GET", f"/v1/batches/{id}")
        return batch if batch["status"] in LAST else None

    return wait_until(batch)


def test_a_batch_with_openai_s_sdk(batching: Server) -> None:
    batching.engine.script = lambda number: Script([80])
    client = sdk(batching)
    content = lines(3) + lines(1, temperature=9).replace(b"r-0", b"bad")
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "in.jsonl", "batch")
    assert client.files.content(file.id).read() == content
    assert client.files.retrieve(file.id) == file and [f.id for f in client.files.list()] == [
        file.id
    ]
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h",
        metadata={"run": "1"},
    )  # fmt: skip
    while batch.status not in LAST:
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.metadata == {"run": "1"}
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.completed_at or 0)
    assert batch.request_counts is not None and batch.output_file_id and batch.error_file_id
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    answers = [json.loads(x) for x in client.files.content(batch.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["r-0", "r-1", "r-2"]
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    (error,) = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(error)["response"]["body"]["error"]["param"] == "temperature"
    assert {item.user for item in batching.engine.submitted} == {"alice\0batch"}
    assert {item.cache_salt for item in batching.engine.submitted} == {"alice\0"}
    assert [b.id for b in client.batches.list()] == [batch.id]
    for id in (file.id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(id).deleted
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_another_key_s_ids_do_not_exist(batching: Server) -> None:
    batching.engine.script = lambda number: Script([80])
    batch = ended(batching, begin(batching, lines(1)))
    for path in (f"/v1/files/{batch['input_file_id']}", f"/v1/files/{batch['output_file_id']}",
                 f"/v1/files/{batch['output_file_id']}/content", f"/v1/batches/{batch['id']}",
                 "/v1/files/x", "/v1/batches/..%2Fx"):  # fmt: skip
        status, error = ask(batching, "GET", path, who=BOB)
        assert (status, error["error"]["code"]) == (404, 404)
    assert ask(batching, "DELETE", f"/v1/files/{batch['input_file_id']}", who=BOB)[0] == 404
    assert ask(batching, "POST", f"/v1/batches/{batch['id']}/cancel", who=BOB)[0] == 404
    body = {"input_file_id": batch["input_file_id"], "endpoint": "/v1/completions"}
    assert ask(batching, "POST", "/v1/batches", body, who=BOB)[0] == 404
    for path in ("/v1/files", "/v1/batches"):
        assert ask(batching, "GET", path, who=BOB)[1]["data"] == []


def test_an_input_that_is_wrong_fails_with_its_lines(batching: Server) -> None:
    content = lines(1) + b"not json\n" + lines(1) + lines(2, stream=True).partition(b"\n")[2]
    content += lines(9).splitlines()[8].replace(b"/v1/completions", b"/v1/chat/completions")
    batch = ended(batching, begin(batching, content))
    errors = batch["errors"]["data"]
    assert batch["status"] == "failed" and batch["output_file_id"] is None
    assert [(error["line"], error["code"]) for error in errors] == [
        (2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_stream"),
        (5, "mismatched_url"),
    ]  # fmt: skip
    assert ended(batching, begin(batching, b"\n"))["errors"]["data"][0]["code"] == "empty_file"
    assert batching.engine.submitted == []


def test_an_input_of_too_many_lines(batching: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_LINES", 2)
    batch = ended(batching, begin(batching, lines(3)))
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["message"]) == (
        "too_many_lines", "the file has more than 2 lines"
    )  # fmt: skip
    batching.engine.script = lambda number: Script([80])
    assert ended(batching, begin(batching, lines(2)))["status"] == "completed"


def test_cancelled_it_keeps_what_it_has(batching: Server) -> None:
    batching.engine.script = lambda number: Script([80], delay_s=0.0 if number == 0 else 0.05)
    first = begin(batching, lines(5, max_tokens=500))
    second = begin(batching, lines(1))
    _, listed = ask(batching, "GET", "/v1/batches?limit=1")
    assert listed["data"][0]["id"] == second and listed["has_more"]
    _, listed = ask(batching, "GET", f"/v1/batches?after={second}")
    assert [batch["id"] for batch in listed["data"]] == [first]
    _, listed = ask(batching, "GET", "/v1/batches?order=asc")
    assert [batch["id"] for batch in listed["data"]] == [first, second]
    assert (listed["first_id"], listed["last_id"]) == (first, second)
    path = f"/v1/batches/{first}"
    wait_until(lambda: ask(batching, "GET", path)[1]["request_counts"]["completed"] == 1)
    assert ask(batching, "GET", path)[1]["status"] == "in_progress"
    input_id = ask(batching, "GET", path)[1]["input_file_id"]
    status, error = ask(batching, "DELETE", f"/v1/files/{input_id}")
    assert status == 400 and first in error["error"]["message"]
    assert ask(batching, "POST", f"/v1/batches/{second}/cancel")[1]["status"] == "cancelled"
    assert ask(batching, "POST", f"{path}/cancel")[1]["status"] == "cancelling"
    batch = ended(batching, first)
    assert batch["status"] == "cancelled" and batch["cancelled_at"] is not None
    _, _, answers = batching.request(
        "GET", f"/v1/files/{batch['output_file_id']}/content", None, ALICE
    )
    assert json.loads(answers)["custom_id"] == "r-0"
    assert ask(batching, "POST", f"{path}/cancel")[0] == 400
    wait_until(lambda: not batching.engine.running())


def test_it_goes_on_after_a_restart(tokenizer_folder: Path, tmp_path: Path) -> None:
    with serving(tokenizer_folder, tmp_path) as server:
        server.engine.script = lambda number: Script([80], delay_s=0.0 if number < 3 else 9.0)
        id = begin(server, lines(8))
        path = f"/v1/batches/{id}"
        wait_until(lambda: ask(server, "GET", path)[1]["request_counts"]["completed"] == 3)
    (tmp_path / "batches" / "new" / "half").write_bytes(b"x")
    (tmp_path / "batches" / "files" / f"file-{'0' * 32}").write_bytes(b"x")
    with serving(tokenizer_folder, tmp_path) as server:
        server.engine.script = lambda number: Script([80])
        batch = ended(server, id)
        assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 8
        assert len(server.engine.submitted) == 5, "what was answered is not asked again"
        answers = content_of(server, batch["output_file_id"])
        ids = [json.loads(answer)["custom_id"] for answer in answers.splitlines()]
        assert ids == [f"r-{n}" for n in range(8)]
        assert len(list((tmp_path / "batches" / "files").iterdir())) == 4
        assert list((tmp_path / "batches" / "new").iterdir()) == []


def wait_ready(process: Process) -> Connection:
    wait_until(lambda: process.is_in("ready"), START_S)
    return Connection("127.0.0.1", process.port, timeout=20)


def call(connection: Connection, method: str, path: str, body: Any = None) -> Any:
    """The JSON of a reply; bytes are a form."""
    is_form = isinstance(body, bytes)
    kind = "multipart/form-data; boundary=B" if is_form else "application/json"
    data = body if is_form or body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": kind})
    return json.loads(connection.getresponse().read())


def wait_answered(connection: Connection, path: str, num_lines: int) -> Any:
    """The batch once so many lines are; once it has ended where that is all of them."""

    def far_enough() -> Any:
        batch = call(connection, "GET", path)
        counts = batch["request_counts"]
        is_far = counts["completed"] >= num_lines
        is_over = batch["status"] in LAST or counts["completed"] < counts["total"]
        return batch if is_far and is_over else None

    return wait_until(far_enough)


def test_killed_it_answers_each_line_once(tokenizer_folder: Path, tmp_path: Path) -> None:
    form = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B\r\n'
    form += b'Content-Disposition: form-data; name="file"; filename="in"\r\n\r\n'
    path = ""
    for is_last in (False, True):
        with start(tokenizer_folder, "well", 10, str(tmp_path / "batches")) as process:
            connection = wait_ready(process)
            if not path:
                file = call(connection, "POST", "/v1/files", form + lines(60) + b"\r\n--B--\r\n")
                body = {"input_file_id": file["id"], "endpoint": "/v1/completions"}
                path = "/v1/batches/" + call(connection, "POST", "/v1/batches", body)["id"]
            batch = wait_answered(connection, path, 60 if is_last else 12)
            process.popen.kill()
            connection.close()
    assert batch["status"] == "completed" and batch["error_file_id"] is None
    content = (tmp_path / "batches" / "files" / batch["output_file_id"]).read_text()
    ids = [json.loads(line)["custom_id"] for line in content.splitlines()]
    assert ids == [f"r-{n}" for n in range(60)]


def test_it_expires_with_what_it_has(batching: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.api.batches.service.WINDOW_S", 1)
    batching.engine.script = lambda number: Script([80], delay_s=0.0 if number == 0 else 9.0)
    batch = ended(batching, begin(batching, lines(3)))
    assert batch["status"] == "expired" and batch["expired_at"] is not None
    num_late = 3 - batch["request_counts"]["completed"]
    assert num_late in (2, 3) and batch["request_counts"]["failed"] == num_late
    errors = content_of(batching, batch["error_file_id"]).splitlines()
    assert [json.loads(e)["error"]["code"] for e in errors] == ["batch_expired"] * num_late
    assert json.loads(errors[-1])["custom_id"] == "r-2"


def test_a_full_disk_leaves_nothing_half(batching: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MIN_FREE_BYTES", 2**60)
    status, error = upload(batching, lines(1))
    assert status == 507 and "the disk has" in error["error"]["message"]
    monkeypatch.undo()
    batching.engine.script = lambda number: Script([80])

    def put(*_: Any, **__: Any) -> None:
        raise JournalError("journal: No space left on device")

    monkeypatch.setattr("pyserve.api.batches.journal.Journal.put", put)
    batch = ended(batching, begin(batching, lines(2)))
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["message"] == "journal: No space left on device"
    assert batching.state.batches is not None
    assert list(batching.state.batches.store.folder.glob("*/*.journal")) == []


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "no valid multipart"),
        (b"x" * 5000, 400, "no valid multipart"),
        (b"--B--\r\n", 400, "purpose is missing"),
        (b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B--\r\n', 400,
         "file is missing"),
        (b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"p" * 5000
         + b"\r\n--B--\r\n", 400, "purpose has more than 1024 bytes"),
        (b"--B\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n--C--\r\n--B--\r\n", 400,
         "a form inside a form"),
        (b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n' * 20 + b"--B--\r\n", 400,
         "more than 16 parts"),
        (b"\n" * 50_000, 400, "more than 1024 lines"),
    ],
)  # fmt: skip
def test_forms_that_are_none(batching: Server, body: bytes, status: int, words: str) -> None:
    got, error = send(batching, body)
    assert got == status and words in error["error"]["message"], error
    assert upload(batching, b"x")[0] == 200, "the next one is served"
    assert batching.state.batches is not None
    assert list((batching.state.batches.store.folder / "new").iterdir()) == []


def test_a_name_that_is_no_utf8(batching: Server) -> None:
    body = b"".join([
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="\xff.jsonl"\r\n\r\nx\r\n',
        b"--B--\r\n",
    ])  # fmt: skip
    status, file = send(batching, body)
    assert status == 200 and file["filename"] == "?.jsonl", file


def test_what_is_too_much(batching: Server) -> None:
    status, error = upload(batching, b"x" * 100_001)
    assert status == 413 and "100000" in error["error"]["message"]
    status, error = upload(batching, b"x", purpose="fine-tune")
    assert status == 400 and error["error"]["param"] == "purpose"
    for _ in range(3):
        assert upload(batching, b"x" * 100_000)[0] == 200
    status, error = upload(batching, b"x" * 99_999)
    assert status == 507 and "--batch-max-total-bytes" in error["error"]["message"]
    connection = Connection("127.0.0.1", batching.port, timeout=20)
    connection.putrequest("POST", "/v1/files")
    for name, value in {**ALICE, "Content-Type": "multipart/form-data; boundary=B"}.items():
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    assert connection.getresponse().status == 413, "refused before it comes"
    connection.close()


def test_a_cancel_is_never_undone(batching: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the batch is opened, which takes a while."""
    batching.engine.script = lambda number: Script([80])
    is_opening, may_open = threading.Event(), threading.Event()

    class SlowJournal(Journal):
        def __init__(self, path: Path, **options: Any) -> None:
            is_opening.set()
            assert may_open.wait(20)
            super().__init__(path, **options)

    monkeypatch.setattr(service, "Journal", SlowJournal)
    id = begin(batching, lines(3))
    assert is_opening.wait(20)
    assert ask(batching, "POST", f"/v1/batches/{id}/cancel")[1]["status"] == "cancelling"
    may_open.set()
    batch = ended(batching, id)
    assert (batch["status"], batch["output_file_id"]) == ("cancelled", None)
    assert batching.engine.submitted == []


def test_many_at_once_are_counted(batching: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    batching.engine.script = lambda number: Script([80], delay_s=0.05)
    monkeypatch.setattr(service, "MAX_UNFINISHED", 2)
    file = upload(batching, lines(1, max_tokens=500))[1]
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, batching, "POST", "/v1/batches", body) for _ in range(8)]
    answers = [future.result(30) for future in asked]
    assert sorted(status for status, _ in answers) == [200] * 2 + [400] * 6
    for status, batch in answers:
        if status == 200:
            ask(batching, "POST", f"/v1/batches/{batch['id']}/cancel")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_batches_that_are_refused(batching: Server, change: dict[str, Any], param: str) -> None:
    file = upload(batching, lines(1))[1]
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", **change}
    status, error = ask(batching, "POST", "/v1/batches", body)
    assert (status, error["error"]["param"]) == (400, param), error
    for query in ("limit=0", "limit=x", "limit=99999999999", "limit=1" + "0" * 5000, "after=x",
                  "limit=000000001" + "9" * 5000):  # fmt: skip
        assert ask(batching, "GET", f"/v1/files?{query}")[0] == 400


def test_without_a_folder_it_says_how_to_get_one(server: Server) -> None:
    for method, path in (("GET", "/v1/files"), ("GET", "/v1/batches/x"), ("POST", "/v1/files")):
        status, error = ask(server, method, path, who={})
        assert status == 400 and "--batch-dir" in error["error"]["message"]


def test_old_batches_are_forgotten_and_files_are_counted(
    batching: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MAX_BATCHES", 2)
    monkeypatch.setattr(stores, "MAX_FILES", 10)  # of the two who have a key
    ids = [ended(batching, begin(batching, b"\n"))["id"] for _ in range(3)]
    assert [b["id"] for b in ask(batching, "GET", "/v1/batches")[1]["data"]] == ids[:0:-1]
    status, file = upload(batching, b"x")
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    status, error = ask(batching, "POST", "/v1/batches", body)
    assert status == 507 and "with 2 more than the limit of 5" in error["error"]["message"]
    assert upload(batching, b"x")[0] == 200
    status, error = upload(batching, b"x")
    assert status == 507 and "5 files, and 0 that batches" in error["error"]["message"]
    assert upload(batching, b"x", BOB)[0] == 200
    assert batching.state.batches is not None
    store = batching.state.batches.store
    assert store.num_bytes == 6 * (1 + 4096) + 2 * 4096
    for file in ask(batching, "GET", "/v1/files")[1]["data"]:
        assert ask(batching, "DELETE", f"/v1/files/{file['id']}")[1]["deleted"]
    assert store.num_bytes == 1 + 4096 + 2 * 4096


def test_one_server_a_folder(tokenizer_folder: Path, tmp_path: Path) -> None:
    store = stores.Store(tmp_path, max_file_bytes=1, max_bytes=1)
    with pytest.raises(StartupError, match="another server has it"):
        stores.Store(tmp_path, max_file_bytes=1, max_bytes=1)
    store.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="--batch-dir .*Not a directory"):
        stores.Store(tmp_path / "file", max_file_bytes=1, max_bytes=1)
